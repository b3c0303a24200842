"""The shards in a folder, and an account of its other files."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from resnet_dist.data.findings import REPORT_NAME, Findings, one_line
from resnet_dist.data.images.formats import IMAGE_EXTENSIONS
from resnet_dist.data.shards.members import tool_file
from resnet_dist.data.shards.offsets import BESIDE_INDEX_SUFFIX
from resnet_dist.data.storage.unpack import compression_of_file
from resnet_dist.data.storage.urls import IDX_SUFFIX, SHARD_SUFFIXES
from resnet_dist.errors import UserError

USTAR_AT, USTAR = 257, b"ustar"  # POSIX and GNU tars have this mark in their first header
# Endings of files that stand beside shards. They are not opened to see whether they are tars.
_OTHER_SUFFIXES = (IDX_SUFFIX, ".json", ".txt", *(f".{extension}" for extension in IMAGE_EXTENSIONS))


def shards_in(folder: Path, findings: Findings) -> list[Path]:
    """Return the shards in a folder, by name: files named as tars, or, where there are none, files that are tars.

    findings: gets the other files. Raises UserError where there are no shards.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{one_line(str(folder))}: cannot be read: {error.strerror}") from None
    named, others = [], []
    for path in paths:
        kind = tool_file(path.name) or ("a hidden file" if path.name.startswith(".") else None)
        if kind is not None:
            findings.pass_over(path.name, kind)
        elif path.name.lower().endswith(SHARD_SUFFIXES) and not path.is_dir():
            named.append(path)
        else:
            others.append(path)
    tars = [path for path in others if _is_tar(path)]
    if not named and not tars:
        inner = [path.name for path in others if has_shards(path)]
        hint = f"; its folder {one_line(inner[0])} has some" if inner else ""
        raise UserError(
            f"{one_line(str(folder))}: no shards in this folder; expected {', '.join(SHARD_SUFFIXES)}{hint}"
        )
    for path in others:
        _account(path, findings, is_shard=path in tars and not named)
    return named or tars


def account_beside(folder: Path, listed: Collection[str], findings: Findings) -> None:
    """Record what a folder has beside the shards that its index lists, by their names."""
    with suppress(UserError):  # It has no shards: they lie elsewhere.
        for path in shards_in(folder, findings):
            if path.name not in listed:
                findings.leave_out(path.name, "a shard that the index does not list")


def _is_tar(path: Path) -> bool:
    return not path.name.lower().endswith(_OTHER_SUFFIXES) and has_tar_header(path)


def has_tar_header(path: Path) -> bool:
    """Report whether a file begins as a tar does, whatever its name. A pipe is not looked into: its bytes would be lost."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            file.seek(USTAR_AT)
            return file.read(len(USTAR)) == USTAR
    except OSError:
        return False


def has_shards(path: Path) -> bool:
    """Report whether a folder has files that are named as tars."""
    try:
        return path.is_dir() and any(file.name.lower().endswith(SHARD_SUFFIXES) for file in path.iterdir())
    except OSError:
        return False


def _account(path: Path, findings: Findings, *, is_shard: bool) -> None:
    """Record what became of a file of the folder that is not named as a shard."""
    if is_shard or path.name.endswith((IDX_SUFFIX, ".json", REPORT_NAME)):
        return  # indexes and reports lie beside shards: ours, or another program's
    if path.is_dir():
        if has_shards(path):
            findings.leave_out(f"{path.name}/", "a folder of shards among shards")
        elif path.suffix != BESIDE_INDEX_SUFFIX:
            findings.pass_over(f"{path.name}/", "a folder among shards")
    elif _is_tar(path):
        findings.leave_out(path.name, "a tar without the name of one, beside others that have it")
    elif not path.name.lower().endswith(_OTHER_SUFFIXES) and compression_of_file(path):
        findings.leave_out(path.name, "a compressed file without the name of a tar")
    else:
        findings.pass_over(path.name, "a file that is no tar")
