"""The output folder of a preparation: checked before anything is read, cleaned where a split is refused."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from resnet_dist.data.findings import REPORT_NAME, one_line
from resnet_dist.data.shards.index import INDEX_NAME
from resnet_dist.errors import UserError

PLAN_NAME = ".plan.json"  # in the folder of a split until its index is written
LOCK_NAME = ".lock"
_OWN_FILES = (INDEX_NAME, PLAN_NAME, LOCK_NAME, REPORT_NAME)
_OWN_SUFFIXES = (".tar", ".idx", ".partial")


def check_output(out: Path, splits: Sequence[str]) -> None:
    """Raise UserError where a split's folder cannot be written. A split that has its index is not written again."""
    for split in splits:
        folder = out / split
        try:
            if not is_complete(folder):
                _check_writable(folder)
        except OSError as error:  # UserError is none
            raise UserError(
                f"{one_line(str(folder))}: cannot be written ({error.strerror}); give another output folder"
            ) from None


def is_complete(folder: Path) -> bool:
    """Report whether a split's folder has its index, which is written last."""
    return (folder / INDEX_NAME).exists()


def _check_writable(folder: Path) -> None:
    """Raise UserError where the path cannot be a folder, and OSError where the folder cannot be written."""
    existing = folder
    while not existing.exists():
        if existing.is_symlink():
            raise UserError(
                f"{one_line(str(folder))}: {one_line(str(existing))} is a broken link; give another output folder"
            )
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(
            f"{one_line(str(folder))}: {one_line(str(existing))} is a file; give another output folder"
        )
    # Try it: access rights alone do not show a file system that is mounted for reading, nor a quota.
    with tempfile.TemporaryFile(dir=existing):
        pass


def check_apart(source: str, out: Path) -> None:
    """Raise UserError where the output would hide part of the source, or lie among its classes.

    source: a folder. An output folder inside it is passed over when it is scanned, and so it must hold nothing else.
    """
    if not os.path.isdir(out):
        return
    if any(same_folder(Path(source), folder) for folder in (out, out / "train", out / "eval")):
        raise UserError(f"{one_line(str(out))}: would put shards into the source itself; give another folder")
    if not _is_inside(out, Path(source)):
        return
    foreign = [path for path in sorted(out.iterdir()) if not _is_own(path)]
    if foreign:
        raise UserError(
            f"{one_line(str(out))}: lies in the source and holds {one_line(foreign[0].name)}, which `prepare` did not "
            "write and would pass over; give another output folder"
        )


def same_folder(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _is_inside(folder: Path, source: Path) -> bool:
    return any(same_folder(parent, source) for parent in folder.resolve().parents)


def _is_own(path: Path) -> bool:
    if path.name in ("train", "eval") and path.is_dir():
        return all(_is_own_file(file) for file in path.iterdir())
    return path.name.startswith(".")


def _is_own_file(path: Path) -> bool:
    return path.name in _OWN_FILES or path.suffix in _OWN_SUFFIXES


def remove_unfinished(folder: Path) -> None:
    """Remove what a preparation has written to a split's folder, and the folder where nothing else is in it."""
    for path in list(folder.iterdir()):
        if _is_own_file(path):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()
