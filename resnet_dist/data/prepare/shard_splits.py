"""Shards as a source: the index of each split, by the names of its folders, and the folders that have none.

Nothing disappears beside the splits that are found: a half without an index is refused, another folder of a split is a
finding, and shards without any index are named with the command that makes one, or that finishes them.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from resnet_dist.data.findings import Findings, one_line
from resnet_dist.data.images.formats import IMAGE_EXTENSIONS
from resnet_dist.data.prepare.layout import best_eval, is_eval, is_train, only_train
from resnet_dist.data.prepare.output import LOCK_NAME, PLAN_NAME
from resnet_dist.data.prepare.scan import Folder, Scan
from resnet_dist.data.shards.index import INDEX_NAME, SECOND_INDEX_NAME
from resnet_dist.data.shards.listing import has_shards
from resnet_dist.data.shards.members import tool_file
from resnet_dist.errors import UserError

_KINDS = {"train": (is_train, only_train), "eval": (is_eval, best_eval)}
OTHER_FOLDER = "a folder of a split, beside the one that is used"
# Not the advice to make an index: that of a part of the shards would lose the others in silence.
UNFINISHED = "`resnet-dist prepare` has begun to write it and has not ended; repeat that call"


def indexes_of(name: str, split: str | None, output: Path | None) -> dict[str, str]:
    """Return the indexes that a source has, by split: it is one, a folder with one, or one with folders of splits.

    split: the only one that is wanted. output: a folder that is passed over. Empty where the source is something else.
    Raises UserError where an index does not name its split and `split` does not either, where folders can be read in
    two ways, or where one half alone has an index.
    """
    if (name.endswith(".json") and _is_index(Path(name))) or _has_index(Path(name)):
        if split is None:
            raise UserError(f"{one_line(name)}: is an index of one split; pass --split train or --split eval")
        return {split: name}
    folders = _folders(name, output)
    found: dict[str, str] = {}
    for kind, (is_kind, choose) in _KINDS.items():
        named = [folder for folder in folders if is_kind(folder) and _has_index(Path(name) / folder)]
        if named and split in (None, kind):
            found[kind] = choose(one_line(name), named)
        elif named:
            found[kind] = named[0]
    if split is not None and split in found:
        found = {split: found[split]}
    elif len(found) == 1:
        _check_half(name, *next(iter(found.items())), folders)
    return {kind: str(Path(name) / folder) for kind, folder in found.items()}


def beside(name: str, indexes: Mapping[str, str], split: str | None, output: Path | None) -> Findings:
    """Return the other folders of the splits that are used, as left out. indexes: those of `indexes_of`."""
    findings = Findings()
    used = {Path(location) for location in indexes.values()}
    for folder in _folders(name, output) if Path(name) not in used else ():
        path = Path(name) / folder
        is_wanted = any(is_kind(folder) for kind, (is_kind, _) in _KINDS.items() if split in (None, kind))
        if is_wanted and path not in used and _has_content(path):
            count = max(1, sum(len(files) for _, _, files in os.walk(path)))
            findings.leave_out(f"{folder}/", OTHER_FOLDER, f"{count:,} of its files", count)
    return findings


def check_indexed(name: str, split: str | None, output: Path | None) -> None:
    """Raise UserError where a folder has shards in place of images, but no index for them."""
    root, scan = Folder(name), Scan(output)
    folders = scan.subfolders(root)
    bare = [] if folders else [name]
    for kind, (is_kind, _) in _KINDS.items():
        named = [folder for folder in folders if is_kind(folder)]
        # A training split alone may have anything beside it.
        if split in (None, "eval", kind) and not any(scan.subfolders(root.sub(folder)) for folder in named):
            bare += [str(Path(name) / folder) for folder in named]
    for place in bare:
        # A class may be called train or dev, and have an archive beside its images.
        if has_shards(Path(place)) and not _has_images(Path(place)):
            advice = (
                UNFINISHED
                if _is_unfinished(Path(place))
                else f"`resnet-dist index {_quoted(place)}` makes one of shards, which are a source then; unpack tars of "
                "anything else"
            )
            raise UserError(f"{one_line(place)}: holds tars, but no index; {advice}")


def _check_half(name: str, split: str, folder: str, folders: list[str]) -> None:
    """Raise UserError where a folder of the other split has something in it, but no index."""
    other = "eval" if split == "train" else "train"
    is_other, _ = _KINDS[other]
    without = [path for path in folders if is_other(path) and _has_content(Path(name) / path)]
    if without:
        place = _quoted(str(Path(name) / without[0]))
        if _is_unfinished(Path(name) / without[0]):
            advice = UNFINISHED
        elif has_shards(Path(name) / without[0]):
            advice = f"`resnet-dist index {place}` makes one"
        else:
            advice = f"`resnet-dist prepare {place} OUT --split {other}` writes it as shards"
        raise UserError(
            f"{one_line(name)}: {one_line(folder)}/ holds shards with an index, but {one_line(without[0])}/ beside it has "
            f"none; {advice}, and --split {split} takes {one_line(folder)}/ alone"
        )


def _folders(name: str, output: Path | None) -> list[str]:
    """Return the names of the folders in a source that may be splits; none where it is no folder."""
    return Scan(output).subfolders(Folder(name)) if os.path.isdir(name) else []


def _has_content(folder: Path) -> bool:
    """Report whether anything lies in a folder, but for hidden files and those of tools, or `prepare` writes it.

    One that cannot be read has something.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return True
    seen = (name for name in names if tool_file(name) is None and not name.startswith("."))
    return any(seen) or _is_unfinished(folder)


def _is_unfinished(folder: Path) -> bool:
    """Report whether a call of `prepare`, under way or interrupted, has begun to write a folder without an index."""
    return any((folder / name).exists() for name in (PLAN_NAME, LOCK_NAME))


def _has_images(folder: Path) -> bool:
    """Report whether a folder has files that are named as images. One that cannot be read has none."""
    try:
        return any(path.suffix[1:].lower() in IMAGE_EXTENSIONS for path in folder.iterdir())
    except OSError:
        return False


def _has_index(folder: Path) -> bool:
    return any(_is_index(folder / file) for file in (INDEX_NAME, SECOND_INDEX_NAME))


def _is_index(path: Path) -> bool:
    """Report whether a file lists shards: a folder of images may hold an index.json of something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "shardlist" in value


def _quoted(place: str) -> str:
    return one_line(shlex.quote(place))
