"""The members of a tar, grouped into samples by webdataset's rules, with their offsets.

They are read once from the tar's headers, or from the DALI `.idx` file beside it. Nothing is ever extracted: a
member's name is a key, never a path.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from resnet_dist.errors import UserError
from resnet_dist.system.files import write_text_atomically

IDX_VERSION = "v1.2"  # of DALI's format
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
LABEL_EXTENSIONS = ("cls", "json")

# These follow webdataset's base_plus_ext and skip_meta: the extension begins at the first dot of the last part.
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")


class TarError(UserError):
    """A tar, or its `.idx`, that is damaged or not one."""


@dataclass(frozen=True)
class Member:
    """A file inside a tar: its content starts at byte `offset` and has `size` bytes."""

    extension: str
    offset: int
    size: int
    name: str

    @property
    def key(self) -> str:
        match = _KEY_AND_EXTENSION.match(self.name)
        key = match[1] if match else self.name
        # A name in a tar may be any bytes; a key must be printable.
        return key.encode(errors="backslashreplace").decode()

    @property
    def is_json(self) -> bool:
        """Report whether the extension is `json` or ends in `.json`, such as `meta.json`."""
        return self.extension.rpartition(".")[2] == "json"


def places_of(samples: Sequence[Sequence[Member]]) -> NDArray[np.int64]:
    """Return the places of image and label of N samples, (N, 5) int64.

    The columns are image offset, image size, label offset, label size, and 1 for a label in JSON. A size of -1
    means that the member is missing. An array takes 40 bytes per sample, so that many shards can be open at once.
    """
    places_N5 = np.full((len(samples), 5), (0, -1, 0, -1, 0), np.int64)
    for row, members in enumerate(samples):
        image, label = find_image(members), find_label(members)
        if image is not None:
            places_N5[row, :2] = image.offset, image.size
        if label is not None:
            places_N5[row, 2:] = label.offset, label.size, label.is_json
    return places_N5


def find_image(members: Iterable[Member]) -> Member | None:
    """Return the image: the first member with an image's extension, else the first dotted one such as `left.jpg`."""
    return _find(members, IMAGE_EXTENSIONS)


def find_label(members: Iterable[Member]) -> Member | None:
    """Return the label: the `.cls` member, else the `.json` member, plain before dotted."""
    return _find(members, LABEL_EXTENSIONS[:1]) or _find(members, LABEL_EXTENSIONS[1:])


def _find(members: Iterable[Member], extensions: Sequence[str]) -> Member | None:
    dotted = None
    for member in members:
        if member.extension in extensions:
            return member
        if dotted is None and member.extension.rpartition(".")[2] in extensions:
            dotted = member
    return dotted


def group_samples(file: IO[bytes], name: str) -> Iterator[list[Member]]:
    """Yield the members of each sample of an uncompressed tar, by webdataset's rules.

    Raises TarError where the tar is damaged, cut off, or names a member of a sample twice.
    """
    current: str | None = None
    members: list[Member] = []
    for info in _members(file, name):
        match = _KEY_AND_EXTENSION.match(info.name)
        if not info.isreg() or match is None or _META.match(info.name):
            continue
        key, extension = match[1], match[2].lower()
        if key != current and members:
            yield members
            members = []
        if any(extension == member.extension for member in members):
            raise TarError(f"{name}: {info.name} appears twice in one sample")
        current = key
        members.append(Member(extension, info.offset_data, info.size, info.name))
    if members:
        yield members


def _members(file: IO[bytes], name: str) -> Iterator[tarfile.TarInfo]:
    """Yield every member. Raises TarError where tarfile alone would stop silently: at a damaged or cut-off header."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    last = "the beginning"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.issparse():
                    raise TarError(f"{name}: {info.name} is sparse; write the tar without holes")
                if info.offset_data + info.size > size:
                    raise TarError(f"{name}: cut off inside {info.name}: has {size:,} bytes")
                yield info
                last = info.name
                # tarfile keeps every header; a long tar would fill the memory.
                tar.members.clear()  # type: ignore[attr-defined]
            end = tar.offset
    except (tarfile.TarError, EOFError, OverflowError, ValueError, UnicodeError) as error:
        if isinstance(error, TarError):
            raise
        if size == 0:
            raise TarError(f"{name}: empty") from None
        raise TarError(f"{name}: not a tar, or damaged after {last}: {error}") from None
    # Require the end marker: without it, a cut between two members would lose the rest silently.
    if size < end + tarfile.BLOCKSIZE:
        raise TarError(f"{name}: cut off after {last}: it has no end marker")
    file.seek(end)
    # Require zeros up to the end of the file: tarfile takes a header that was zeroed for the end of the tar.
    while block := file.read(2**20):
        if any(block):
            raise TarError(
                f"{name}: damaged, cut off, or continued after its end, behind {last} at byte {end:,}"
            )


def write_idx(path: Path, samples: Sequence[Sequence[Member]]) -> bool:
    """Write a DALI index and return True.

    Return False where a name has white space, at which DALI splits, or is not UTF-8. An older file at `path` is then
    removed, because it describes another tar.
    """
    lines = [f"{IDX_VERSION} {len(samples)}"]
    for members in samples:
        fields = [field for m in members for field in (m.extension, str(m.offset), str(m.size), m.name)]
        if any(len(field.split()) != 1 or not _is_utf8(field) for field in fields):
            path.unlink(missing_ok=True)
            return False
        lines.append(" ".join(fields))
    write_text_atomically(path, "\n".join(lines) + "\n")
    return True


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_idx(path: Path) -> list[list[Member]]:
    """Return the members of every sample. Raises FileNotFoundError, or TarError where the file is damaged."""
    try:
        header, *lines = path.read_text("utf-8").splitlines()
        samples = [_parse_idx_line(line) for line in lines]
        if header.split() != [IDX_VERSION, str(len(samples))]:
            raise ValueError(f"begins with {header[:40]!r} and has {len(samples)} samples")
    except (ValueError, IndexError) as error:
        raise TarError(f"{path}: not a DALI index ({error})") from None
    return samples


def _parse_idx_line(line: str) -> list[Member]:
    fields = line.split(" ")
    if len(fields) % 4:
        raise ValueError(f"line {line[:60]!r} is not groups of extension, offset, size, name")
    members = [
        Member(fields[i], int(fields[i + 1]), int(fields[i + 2]), fields[i + 3])
        for i in range(0, len(fields), 4)
    ]
    if any(m.offset < tarfile.BLOCKSIZE or m.size < 0 or m.offset + m.size >= 2**63 for m in members):
        raise ValueError(f"line {line[:60]!r} has an offset or size that no tar can have")
    return members


def check_header(fd: int, name: str, member: Member) -> None:
    """Raise TarError unless the tar has the header of `member` where its `.idx` puts it."""
    header = os.pread(fd, tarfile.BLOCKSIZE, member.offset - tarfile.BLOCKSIZE)
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        found = info.size, info.name.rpartition("/")[2]
    except (tarfile.TarError, ValueError):
        found = None
    expected = member.name.rpartition("/")[2]
    # This header may not have the whole name: it holds at most 100 bytes, and what a writer makes of a name that is
    # not ASCII differs (tarfile: a "?" per character). Such a name is in the header before, which is not read here.
    is_elsewhere = len(expected) > 90 or not expected.isascii()
    if found is None or found[0] != member.size or not (expected == found[1] or is_elsewhere):
        raise TarError(
            f"{name}: no member {member.name} of {member.size} bytes at offset {member.offset}, where its .idx "
            "puts it; index the shards again, or bring back the shard it was made from"
        )
