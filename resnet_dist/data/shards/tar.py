"""The members of a tar, read from its headers and grouped into samples, with their offsets.

Nothing is ever extracted: a member's name is a key, never a path.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data.findings import Findings
from resnet_dist.data.images.formats import HEAD_BYTES, describe, format_of
from resnet_dist.data.shards.members import METADATA, WEBDATASET, Member, MemberRules, tool_file
from resnet_dist.errors import UserError

PLAIN_TYPES = b"0\0"  # of a file, in POSIX's format and in the one before it
OCTAL = re.compile(rb" *([0-7]+)[ \0]*")  # a number in a header; a large one is written in another way
BEGINNING = "the beginning"  # in messages, where no member has been read yet


class TarError(UserError):
    """A tar, or its `.idx`, that is damaged or not one."""


def places_of(samples: Sequence[Sequence[Member]], rules: MemberRules = WEBDATASET) -> NDArray[np.int64]:
    """Return the places of image and label of N samples, (N, 5) int64.

    The columns are image offset, image size, label offset, label size, and 1 for a label in JSON. A size of -1
    means that the member is missing. An array takes 40 bytes per sample, so that many shards can be open at once.
    """
    places_N5 = np.full((len(samples), 5), (0, -1, 0, -1, 0), np.int64)
    for row, members in enumerate(samples):
        image, label = rules.image(members), rules.label(members)
        if image is not None:
            places_N5[row, :2] = image.offset, image.size
        if label is not None:
            places_N5[row, 2:] = label.offset, label.size, label.is_json
    return places_N5


def group_samples(
    file: IO[bytes], name: str, rules: MemberRules = WEBDATASET, findings: Findings | None = None
) -> Iterator[list[Member]]:
    """Yield the members of each sample of an uncompressed tar, by webdataset's rules or those of `rules`.

    findings: gets the members that are in no sample. Raises TarError where the tar is damaged, cut off, or names a
    member of a sample twice.
    """
    findings = Findings() if findings is None else findings
    current: str | None = None
    members: list[Member] = []
    for info in _members(file, name):
        parts = rules.split(info.name)
        if _is_no_member(info, parts, rules, findings):
            continue
        assert parts is not None
        key, extension = parts
        if key != current and members:
            yield members
            members = []
        if any(extension == member.extension for member in members):
            raise TarError(f"{name}: {info.name} appears twice in one sample")
        current = key
        members.append(Member(extension, info.offset_data, info.size, info.name))
    if members:
        yield members


def _is_no_member(
    info: tarfile.TarInfo, parts: tuple[str, str] | None, rules: MemberRules, findings: Findings
) -> bool:
    """Return whether an entry of a tar is in no sample, and record why. Folders are not recorded."""
    kind = tool_file(info.name)
    if kind is None and info.isreg() and parts is not None and not METADATA.match(info.name):
        return False
    if info.isdir():
        return True
    is_meant = parts is not None and (rules.is_image(parts[1]) or rules.is_label(parts[1]))
    if kind is not None:
        findings.pass_over(info.name, kind)
    elif info.issym() or info.islnk():
        record = findings.leave_out if is_meant else findings.pass_over
        record(info.name, "a link in a tar, which holds no bytes", f"to {info.linkname}")
    elif not info.isreg():
        findings.pass_over(info.name, "neither a file nor a link")
    elif METADATA.match(info.name):
        findings.pass_over(info.name, "metadata of webdataset")
    else:
        findings.pass_over(info.name, "a name without key or extension")
    return True


def _members(file: IO[bytes], name: str) -> Iterator[tarfile.TarInfo]:
    """Yield every member. Raises TarError where tarfile alone would stop silently: at a damaged or cut-off header."""
    size = file.seek(0, os.SEEK_END)
    start, last = 0, BEGINNING
    while (plain := _plain_member(file, start)) is not None:
        _refuse_cut(plain, size, name)
        yield plain
        start, last = plain.offset_data + _padded(plain.size), plain.name
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.issparse():
                    raise TarError(f"{name}: {info.name} is sparse; write the tar without holes")
                _refuse_cut(info, size, name)
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
        raise TarError(f"{name}: {_damage(file, last)}: {error}") from None
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


def _plain_member(file: IO[bytes], start: int) -> tarfile.TarInfo | None:
    """Return the member whose header is at `start`; None where tarfile has to read on.

    Of a file with a short name in ASCII the header holds everything. tarfile takes five times as long for it, and a shard
    that was just fetched has no other list of its members.
    """
    file.seek(start)
    header = file.read(tarfile.BLOCKSIZE)
    if len(header) < tarfile.BLOCKSIZE or header[257:262] != b"ustar" or header[156] not in PLAIN_TYPES:
        return None
    path = header[:100].partition(b"\0")[0]
    if header[345] or not path or path.endswith(b"/") or not path.isascii():
        return None
    numbers = OCTAL.fullmatch(header[124:136]), OCTAL.fullmatch(header[148:156])
    if not all(numbers):
        return None
    num_bytes, checksum = (int(number[1], 8) for number in numbers if number)
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        return None
    member = tarfile.TarInfo(path.decode("ascii"))
    member.size, member.offset_data = num_bytes, start + tarfile.BLOCKSIZE
    return member


def _padded(num_bytes: int) -> int:
    """Return the bytes that a member's content takes in a tar."""
    return -(-num_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _refuse_cut(info: tarfile.TarInfo, size: int, name: str) -> None:
    if info.offset_data + info.size > size:
        raise TarError(f"{name}: cut off inside {info.name}: has {size:,} bytes")


def _damage(file: IO[bytes], last: str) -> str:
    """Return what is wrong with a tar that cannot be read on behind member `last`."""
    if last != BEGINNING:
        return f"damaged after {last}"
    file.seek(0)
    head = file.read(HEAD_BYTES)
    form = format_of(head)
    found = f"{form.name} image" if form else describe(head)
    return "not a tar, or damaged at its beginning" + (
        "" if "not an image" in found else f"; it looks like {found}"
    )
