"""The place of a new index: checked before anything is read, never over another program's file."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from resnet_dist.data.findings import REPORT_NAME, one_line
from resnet_dist.data.shards.index import INDEX_NAME, SECOND_INDEX_NAME, index_location
from resnet_dist.errors import UserError


def place_of_index(out: Path) -> Path:
    """Return the path at which the index of `out`, a folder or a .json file, will be written.

    In a folder that holds another program's index.json, ours has its second name. Raises UserError where the path
    cannot be written, or a .json file is another program's.
    """
    path = Path(index_location(out))
    if _is_foreign(path):
        if path == out:
            raise UserError(
                f"--out {one_line(str(out))}: holds something else than our index; give another name"
            )
        path = path.with_name(SECOND_INDEX_NAME)
    _check_writable(path)
    return path


def _is_foreign(path: Path) -> bool:
    """Return whether a file exists that is no index of ours: that has shards and classes."""
    if not path.is_file():
        return False
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return True
    return not (isinstance(value, dict) and {"shardlist", "classes"} <= value.keys())


def _check_writable(path: Path) -> None:
    """Raise UserError where a file cannot be written at `path`. Tries it in the nearest folder that exists."""
    shown, folder = one_line(str(path)), path.parent
    if path.is_dir():
        raise UserError(f"{shown}: is a folder; pass --out with a name that ends in .json, or a folder")
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        # Access rights alone do not show a file system that is mounted read-only.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{shown}: cannot be written ({error.strerror}); pass --out with a path that can be"
        ) from None


def report_path(location: Path) -> Path:
    """Return the path of the account beside an index; it carries the index's name unless that is the usual one."""
    if location.name == INDEX_NAME:
        return location.with_name(REPORT_NAME)
    return location.with_name(f"{location.name.removesuffix('.json')}.{REPORT_NAME}")
