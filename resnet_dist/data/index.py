"""The index: which shards there are, how many samples each holds, and where every sample lies in its tar.

`index.json` follows the wids layout, with checksums and class names added; beside every tar lies a DALI
`.idx` file with the offset and size of every member. Both are read by others' tools as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from resnet_dist.config import UserError

INDEX_NAME = "index.json"
IDX_VERSION = "v1.2"
LABEL_EXTENSION = "cls"
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp"})


class IndexMismatch(UserError):
    """Shards and index disagree, or one of them is missing."""


@dataclass(frozen=True)
class Shard:
    path: Path
    num_samples: int
    num_bytes: int
    sha256: str

    @property
    def idx_path(self) -> Path:
        return self.path.with_suffix(".idx")


@dataclass(frozen=True)
class Member:
    """A file inside a tar: its payload starts at `offset` and has `size` bytes."""

    extension: str
    offset: int
    size: int
    name: str


@dataclass(frozen=True)
class Index:
    path: Path
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        return tuple(shard.num_samples for shard in self.shards)

    @property
    def num_samples(self) -> int:
        return sum(self.counts)

    def digest(self) -> str:
        """SHA-256 over the shards' checksums: equal on every rank that sees the same data."""
        text = "".join(f"{s.path.name} {s.num_samples} {s.sha256}\n" for s in self.shards)
        return hashlib.sha256(text.encode()).hexdigest()


def write_index(folder: Path, shards: Sequence[Shard], classes: Sequence[str]) -> Index:
    """Write `index.json`, in one rename: a folder with an index is a complete one."""
    value = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "shardlist": [
            {
                "url": shard.path.name,
                "nsamples": shard.num_samples,
                "filesize": shard.num_bytes,
                "sha256": shard.sha256,
            }
            for shard in shards
        ],
        "classes": list(classes),
    }
    path = folder / INDEX_NAME
    write_text_atomically(path, json.dumps(value, indent=1) + "\n")
    return Index(path, tuple(shards), tuple(classes))


def read_index(location: str | Path) -> Index:
    """The index of a folder, or an index file. Raises IndexMismatch where it is missing or not one."""
    path = Path(location)
    path = path if path.suffix == ".json" else path / INDEX_NAME
    try:
        value = json.loads(path.read_bytes())
        shards = tuple(_shard(path.parent, entry) for entry in value["shardlist"])
        return Index(path, shards, tuple(value["classes"]))
    except FileNotFoundError:
        raise IndexMismatch(f"{path}: no such index; `resnet-dist prepare` writes shards with one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise IndexMismatch(f"{path}: not an index of shards ({type(error).__name__}: {error})") from None


def _shard(folder: Path, entry: dict[str, Any]) -> Shard:
    return Shard(folder / entry["url"], int(entry["nsamples"]), int(entry["filesize"]), str(entry["sha256"]))


def index_shard(path: Path) -> Shard:
    """Read a tar once: write its `.idx`, return its counts and checksum."""
    samples = list(group_samples(path))
    lines = [f"{IDX_VERSION} {len(samples)}"]
    for members in samples:
        lines.append(" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in members))
    write_text_atomically(path.with_suffix(".idx"), "\n".join(lines) + "\n")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path, len(samples), path.stat().st_size, sha256)


def group_samples(path: Path) -> Iterator[list[Member]]:
    """The members of every sample of a tar, grouped by webdataset's own rule for keys."""
    from webdataset.tariterators import base_plus_ext

    current_key: str | None = None
    members: list[Member] = []
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            key, extension = base_plus_ext(info.name)
            if not info.isreg() or key is None:
                continue
            if key != current_key and members:
                yield members
                members = []
            current_key = key
            members.append(Member(extension.lower(), info.offset_data, info.size, info.name))
    if members:
        yield members


def read_idx(shard: Shard) -> list[list[Member]]:
    """The members of every sample of a shard. Raises IndexMismatch where the file is missing or damaged."""
    try:
        header, *lines = shard.idx_path.read_text().splitlines()
        samples = [_parse_idx_line(line) for line in lines]
    except FileNotFoundError:
        raise IndexMismatch(f"{shard.idx_path}: missing, but {INDEX_NAME} lists {shard.path.name}") from None
    except (ValueError, IndexError) as error:
        raise IndexMismatch(f"{shard.idx_path}: not a DALI index ({error})") from None
    if header != f"{IDX_VERSION} {shard.num_samples}" or len(samples) != shard.num_samples:
        raise IndexMismatch(
            f"{shard.idx_path}: lists {len(samples)} samples, but {INDEX_NAME} says {shard.num_samples}"
        )
    return samples


def _parse_idx_line(line: str) -> list[Member]:
    words = line.split(" ")
    if len(words) % 4:
        raise ValueError(f"line {line[:60]!r} is not groups of extension, offset, size, name")
    return [
        Member(words[i], int(words[i + 1]), int(words[i + 2]), words[i + 3]) for i in range(0, len(words), 4)
    ]


def check_shards(index: Index) -> None:
    """Compare every shard with the index: there, of the recorded size, with members where the .idx says.

    Cheap enough to run before every training: two headers a shard are read, not its images. Raises
    IndexMismatch. `sha256` is the thorough check.
    """
    for shard in index.shards:
        try:
            num_bytes = shard.path.stat().st_size
        except FileNotFoundError:
            raise IndexMismatch(f"{shard.path}: missing, but {index.path} lists it") from None
        if num_bytes != shard.num_bytes:
            raise IndexMismatch(
                f"{shard.path}: has {num_bytes:,} bytes, but {index.path} says {shard.num_bytes:,}; "
                "prepare the data again, or bring back the shard it was made from"
            )
        samples = read_idx(shard)
        with shard.path.open("rb") as file:
            for member in (samples[0][0], samples[-1][-1]) if samples else ():
                _check_header(file.fileno(), shard, member)


def _check_header(fd: int, shard: Shard, member: Member) -> None:
    header = os.pread(fd, tarfile.BLOCKSIZE, member.offset - tarfile.BLOCKSIZE)
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        found = info.size, info.name.rpartition("/")[2]
    except tarfile.TarError:
        found = None
    if found != (member.size, member.name.rpartition("/")[2]):
        raise IndexMismatch(
            f"{shard.path}: no member {member.name} of {member.size} bytes at offset {member.offset}, where "
            f"{shard.idx_path.name} puts it; prepare the data again, or bring back the shard it was made from"
        )


def write_text_atomically(path: Path, text: str) -> None:
    """Write aside, flush to disk, rename: `path` holds all of `text` or what it held before."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
