"""Files that keep the offsets of a tar's members, in DALI's `.idx` format, so that its headers are read once.

`X.idx` lies beside `X.tar`, as DALI expects it. Where another program's file has that name, ours is `X.tar.idx`, and so
is that of every shard whose name does not end in `.tar`: NAME and `.idx`. Where the folder may only be read, ours lies
beside the index. Other programs' files are never overwritten, and none is trusted: it must fit its tar.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

from resnet_dist.data.findings import Findings
from resnet_dist.data.shards.members import WEBDATASET, Member, MemberRules
from resnet_dist.data.shards.tar import TarError, group_samples
from resnet_dist.data.storage.urls import IDX_SUFFIX
from resnet_dist.system.files import write_text_atomically

IDX_VERSION = "v1.2"  # the version of DALI's format
TAR_SUFFIX = ".tar"
FULL_KEYS_SUFFIX = ".full.idx"  # the name's end where members are grouped by full keys
BESIDE_INDEX_SUFFIX = ".offsets"  # the end of the folder's name beside an index, in place of .json
MAX_HEADER_LINE = 100  # characters


class State(Enum):
    """The state of a file under the name of an offsets file, compared with the tar."""

    MISSING = auto()
    FITS = auto()  # a DALI index that lists exactly the tar's samples
    STALE = auto()  # a DALI index of another tar, or by other rules
    FOREIGN = auto()  # another program's format, or a file that cannot be read


class Kept(NamedTuple):
    """The result of `keep_offsets`."""

    new: Path | None  # a file that did not exist before
    not_ours: list[Path]  # files under the names of offsets files that do not fit the tar


def idx_path(path: Path) -> Path:
    """Return the path of the DALI index of a tar: X.idx for X.tar, NAME.idx for any other name."""
    if path.suffix == TAR_SUFFIX:
        return path.with_suffix(IDX_SUFFIX)
    return path.with_name(path.name + IDX_SUFFIX)


def offset_files(path: Path, rules: MemberRules = WEBDATASET) -> list[Path]:
    """Return the files beside a tar that may hold its offsets, in the order in which they are tried."""
    if rules.full_keys:
        return [path.with_name(path.name + FULL_KEYS_SUFFIX)]
    return list(dict.fromkeys((path.with_name(path.name + IDX_SUFFIX), idx_path(path))))


def beside_index(index: Path, number: int) -> Path:
    """Return the file beside an index that keeps the offsets of its shard `number`, if the shard's folder cannot."""
    return index.with_suffix(BESIDE_INDEX_SUFFIX) / f"{number:06d}{IDX_SUFFIX}"


def load_members(
    files: Iterable[Path],
    fd: int,
    name: str,
    count: int,
    rules: MemberRules,
    findings: Findings | None = None,
) -> tuple[list[list[Member]], Path | None]:
    """Return the members of each sample, from the first of `files` that fits the tar, else from the tar's headers.

    count: number of samples that the index records; 0: unknown. findings: gets the members that are in no sample, where
    the headers are read. Returns the file too. Raises TarError.
    """
    for file in files:
        samples = fitting(file, fd, count)
        if samples is not None:
            return samples, file
    with os.fdopen(os.dup(fd), "rb") as tar:
        return list(group_samples(tar, name, rules, findings)), None


def fitting(file: Path, fd: int, count: int) -> list[list[Member]] | None:
    """Return the samples of an offsets file if it fits the tar at `fd`; None where it is missing or does not.

    It must list `count` samples (0: unknown), the first, middle and last of which have their headers in the tar.
    """
    try:
        samples = read_idx(file)
        if count and len(samples) != count:
            return None
        for members in (samples[0], samples[len(samples) // 2], samples[-1]) if samples else ():
            check_header(fd, file.name, members[0])
            check_header(fd, file.name, members[-1])
    except (OSError, TarError):  # missing, a folder, no permission, another program's
        return None
    return samples


def is_dali_index(file: Path) -> bool:
    """Report whether a file begins as a DALI index of our version does."""
    try:
        with file.open("rb") as opened:
            return opened.readline(MAX_HEADER_LINE).split()[:1] == [IDX_VERSION.encode()]
    except OSError:
        return False


def keep_offsets(path: Path, samples: Sequence[Sequence[Member]], rules: MemberRules, beside: Path) -> Kept:
    """Write the offsets of a tar beside it; where its folder cannot be written, to `beside`.

    Other programs' files stay as they are. A name with white space or not in UTF-8 has no place in a DALI index: then
    nothing is written, and readers find the offsets in the tar.
    """
    text = idx_text(samples)
    files = offset_files(path, rules)
    own, usual = files[0], files[-1]
    states = {file: _state(file, samples, text) for file in files}
    not_ours = [
        file
        for file, state in states.items()
        if state == State.FOREIGN or (state == State.STALE and file != own)
    ]
    # Readers try our own name first, and pass over what is no DALI index.
    if states[own] == State.FITS or (states[usual] == State.FITS and states[own] != State.STALE):
        _remove(beside)
        return Kept(None, not_ours)
    if text is None:
        _remove(beside, *([own] if states[own] == State.STALE else []))
        return Kept(None, not_ours)
    target = None
    if states[own] == State.STALE or (states[own] == State.MISSING and states[usual] != State.MISSING):
        target = own
    elif states[usual] == State.MISSING:
        target = usual
    return Kept(_write(target, beside, text), not_ours)


def _write(target: Path | None, beside: Path, text: str) -> Path | None:
    """Write to `target`, or to `beside` where that is impossible. Returns the file if it is a new one."""
    for file in (target, beside):
        if file is None:
            continue
        with contextlib.suppress(OSError):
            is_new = not file.exists()
            if file == beside:
                file.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(file, text)
            if file != beside:
                _remove(beside)
            return file if is_new else None
    return None


def _remove(*files: Path) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def _state(file: Path, samples: Sequence[Sequence[Member]], text: str | None) -> State:
    try:
        if text is not None and file.stat().st_size == len(text.encode()) and file.read_text("utf-8") == text:
            return State.FITS
        is_same = read_idx(file) == [list(members) for members in samples]
        return State.FITS if is_same else State.STALE
    except FileNotFoundError:
        return State.MISSING
    except (OSError, TarError, UnicodeDecodeError):
        return State.FOREIGN


def write_idx(path: Path, samples: Sequence[Sequence[Member]]) -> bool:
    """Write a DALI index and return True.

    Return False where a name has white space, at which DALI splits, or is not UTF-8. An older file at `path` is then
    removed, because it describes another tar.
    """
    text = idx_text(samples)
    if text is None:
        path.unlink(missing_ok=True)
        return False
    write_text_atomically(path, text)
    return True


def idx_text(samples: Sequence[Sequence[Member]]) -> str | None:
    """Return the content of a DALI index; None where a name has white space or is not UTF-8."""
    lines = [f"{IDX_VERSION} {len(samples)}"]
    for members in samples:
        fields = [field for m in members for field in (m.extension, str(m.offset), str(m.size), m.name)]
        if any(len(field.split()) != 1 or not _is_utf8(field) for field in fields):
            return None
        lines.append(" ".join(fields))
    return "\n".join(lines) + "\n"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_idx(path: Path) -> list[list[Member]]:
    """Return the members of every sample. Raises FileNotFoundError, or TarError where the file is not a DALI index."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            # Look at the first line alone: another program's file may be large.
            header = file.readline(MAX_HEADER_LINE)
            if header.split()[:1] != [IDX_VERSION]:
                raise ValueError(f"begins with {header[:40]!r}")
            samples = [_parse_idx_line(line) for line in file.read().splitlines()]
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
