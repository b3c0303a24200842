"""What is inside a tar: its members grouped into samples by webdataset's rules, with their offsets.

Read once from the headers, or from a DALI `.idx` file that somebody wrote beside the tar. Nothing is ever
extracted: a member's name is a key, never a path.
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

IDX_VERSION = "v1.2"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
LABEL_EXTENSIONS = ("cls", "json")

# As webdataset's base_plus_ext and its skip_meta: the extension begins at the first dot of the last part.
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")


class TarError(UserError):
    """A tar, or its `.idx`, that is damaged or not one."""


@dataclass(frozen=True)
class Member:
    """A file inside a tar: its payload starts at `offset` and has `size` bytes."""

    extension: str
    offset: int
    size: int
    name: str

    @property
    def key(self) -> str:
        match = _KEY_AND_EXTENSION.match(self.name)
        key = match[1] if match else self.name
        return key.encode(errors="backslashreplace").decode()  # a tar's names are any bytes; ours are printed

    @property
    def is_json(self) -> bool:
        """`.json`, or a dotted one such as `.meta.json`."""
        return self.extension.rpartition(".")[2] == "json"


def places_of(samples: Sequence[Sequence[Member]]) -> NDArray[np.int64]:
    """Where image and label of every sample lie: offset and size of each, and 1 for a label in JSON.

    (N, 5), a size of -1 where there is none. A large set has many shards open: this takes 40 bytes a sample.
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
    """The member that is the image: of a plain extension, else of a dotted one such as `left.jpg`."""
    return _find(members, IMAGE_EXTENSIONS)


def find_label(members: Iterable[Member]) -> Member | None:
    """`.cls`, else `.json`."""
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
    """The members of every sample of an uncompressed tar, by webdataset's rules.

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
            raise TarError(f"{name}: {info.name} is there twice in one sample")
        current = key
        members.append(Member(extension, info.offset_data, info.size, info.name))
    if members:
        yield members


def _members(file: IO[bytes], name: str) -> Iterator[tarfile.TarInfo]:
    """Every member. tarfile itself ends silently at a header that is damaged or cut off."""
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
                tar.members.clear()  # type: ignore[attr-defined] # every header of a tar of any length
            end = tar.offset
    except (tarfile.TarError, EOFError, OverflowError, ValueError, UnicodeError) as error:
        if isinstance(error, TarError):
            raise
        if size == 0:
            raise TarError(f"{name}: empty") from None
        raise TarError(f"{name}: not a tar, or damaged after {last}: {error}") from None
    if size < end + tarfile.BLOCKSIZE:  # a cut between two members would lose what followed without a word
        raise TarError(f"{name}: cut off after {last}: it has no end marker")
    file.seek(end)
    # Zeros up to the end: a header that was zeroed ends a tar too early as well.
    while block := file.read(2**20):
        if any(block):
            raise TarError(
                f"{name}: damaged, cut off, or going on after its end, behind {last} at byte {end:,}"
            )


def write_idx(path: Path, samples: Sequence[Sequence[Member]]) -> bool:
    """Write a DALI index. Returns False where a name has a space, at which DALI splits, or is not UTF-8.

    Then an older file of that name is removed: it would not fit any more.
    """
    lines = [f"{IDX_VERSION} {len(samples)}"]
    for members in samples:
        words = [(m.extension, str(m.offset), str(m.size), m.name) for m in members]
        if any(len(word.split()) != 1 or not _is_utf8(word) for four in words for word in four):
            path.unlink(missing_ok=True)
            return False
        lines.append(" ".join(word for four in words for word in four))
    write_text_atomically(path, "\n".join(lines) + "\n")
    return True


def _is_utf8(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_idx(path: Path) -> list[list[Member]]:
    """The members of every sample. Raises FileNotFoundError, or TarError where the file is damaged."""
    try:
        header, *lines = path.read_text("utf-8").splitlines()
        samples = [_parse_idx_line(line) for line in lines]
        if header.split() != [IDX_VERSION, str(len(samples))]:
            raise ValueError(f"begins with {header[:40]!r} and has {len(samples)} samples")
    except (ValueError, IndexError) as error:
        raise TarError(f"{path}: not a DALI index ({error})") from None
    return samples


def _parse_idx_line(line: str) -> list[Member]:
    words = line.split(" ")
    if len(words) % 4:
        raise ValueError(f"line {line[:60]!r} is not groups of extension, offset, size, name")
    members = [
        Member(words[i], int(words[i + 1]), int(words[i + 2]), words[i + 3]) for i in range(0, len(words), 4)
    ]
    if any(m.offset < tarfile.BLOCKSIZE or m.size < 0 or m.offset + m.size >= 2**63 for m in members):
        raise ValueError(f"line {line[:60]!r} has an offset or size that no tar can have")
    return members


def check_header(fd: int, name: str, member: Member) -> None:
    """Raise TarError unless the tar has `member` where an `.idx` puts it."""
    header = os.pread(fd, tarfile.BLOCKSIZE, member.offset - tarfile.BLOCKSIZE)
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        found = info.size, info.name.rpartition("/")[2]
    except (tarfile.TarError, ValueError):
        found = None
    expected = member.name.rpartition("/")[2]
    # A header holds the last 100 bytes of a long name at most, and of a name that is not ASCII what each writer
    # makes of it (tarfile a "?" for each character): the whole name is in the one before it.
    elsewhere = len(expected) > 90 or not expected.isascii()
    if found is None or found[0] != member.size or not (expected == found[1] or elsewhere):
        raise TarError(
            f"{name}: no member {member.name} of {member.size} bytes at offset {member.offset}, where its .idx "
            "puts it; index the shards again, or bring back the shard it was made from"
        )
