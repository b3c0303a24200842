"""The index of a set of shards: the number of samples in each, their checksums, and the names of the classes.

`index.json` follows the wids layout, with checksums and class names added. Beside every tar lies a DALI `.idx` file
with the offset and size of every member. wids and DALI read these files as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from resnet_dist.data.shards.tar import TarError, check_header, read_idx
from resnet_dist.data.storage.shard_cache import StoredFile, is_plain_local
from resnet_dist.data.storage.transfer import read_bytes
from resnet_dist.data.storage.urls import (
    IDX_SUFFIX,
    folder_of,
    is_local,
    join,
    local_path,
    path_of,
    shown,
    unsigned,
    without_user,
)
from resnet_dist.errors import StorageError, UserError
from resnet_dist.system.files import write_text_atomically

INDEX_NAME = "index.json"
# The options of `resnet-dist prepare` in index.json; `prepare` compares them when it is repeated.
PREPARED_KEY = "prepared"
# Shards whose headers are read at a start: a large set has tens of thousands of shards.
MAX_HEADERS_CHECKED = 512


class IndexMismatch(UserError):
    """An index that disagrees with its shards, or either of them missing."""


@dataclass(frozen=True)
class Shard(StoredFile):
    """A tar of samples."""

    num_samples: int  # 0: unknown


@dataclass(frozen=True)
class Index:
    """The shards of a set and its class names. Sample ids count through the shards in their order."""

    location: str  # path or URL of the index file
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]  # by label

    @cached_property
    def counts(self) -> tuple[int, ...]:
        return tuple(shard.num_samples for shard in self.shards)

    @property
    def num_samples(self) -> int:
        return sum(self.counts)

    def place(self, sample_id: int) -> str:
        """Return the shard of a sample and its position there, for messages: `train-000003.tar[17]`.

        Raises IndexError where there is no such sample.
        """
        for shard in self.shards:
            if sample_id < shard.num_samples:
                return f"{shard.name}[{sample_id}]"
            sample_id -= shard.num_samples
        raise IndexError(sample_id)

    def digest(self) -> str:
        """Return the SHA-256 of names, counts, sizes and checksums of the shards, and of the class names.

        It is equal on every rank that sees the same data.
        """
        text = "".join(f"{s.name} {s.num_samples} {s.num_bytes} {s.checksum}\n" for s in self.shards)
        return hashlib.sha256((text + "\0".join(self.classes)).encode()).hexdigest()


def write_index(
    location: Path,
    shards: Sequence[Shard],
    classes: Sequence[str],
    prepared: Mapping[str, object] | None = None,
) -> Index:
    """Write the index and return it.

    The file appears in one rename, so a folder with an index is complete. Shards in the index's own folder are named
    relative to it, so that the folder can be moved; a web address is written without user and password. prepared: the options of `resnet-dist prepare`.
    """
    path = Path(index_location(location))
    base = str(path.parent) + "/"
    entries = []
    for shard in shards:
        entry = {
            "url": without_user(shard.url).removeprefix(base),
            "nsamples": shard.num_samples,
            "filesize": shard.num_bytes,
        }
        algorithm, _, digest = shard.checksum.partition(":")
        if digest:
            entry["md5sum" if algorithm == "md5" else algorithm] = digest
        entries.append(entry)
    value: dict[str, Any] = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "shardlist": entries,
        "classes": list(classes),
    }
    if prepared is not None:
        value[PREPARED_KEY] = dict(prepared)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(value, indent=1) + "\n")
    if any(unsigned(shard.url) != without_user(shard.url) for shard in shards):
        path.chmod(0o600)  # The signatures are needed here, to fetch the shards, but by nobody else.
    return Index(str(path), tuple(shards), tuple(classes))


def index_location(location: str | Path) -> str:
    """Return the path or URL of the index file: `location` itself, or the file in that folder.

    The query of a web address stays behind the name of the file, and `join` passes it on to the shards.
    """
    text = str(location)
    return text if path_of(text).endswith(".json") else join(text, INDEX_NAME)


def read_index(location: str | Path) -> Index:
    """Read the index of a folder or URL, or an index file. Raises IndexMismatch where it is missing or not one."""
    where = index_location(location)
    try:
        value = json.loads(read_bytes(where))
        shards = shards_of(value, folder_of(where))
        return Index(where, shards, tuple(str(name) for name in value["classes"]))
    except (FileNotFoundError, NotADirectoryError):
        raise IndexMismatch(
            f"{shown(where)}: no such index; `resnet-dist prepare` writes shards with one, `resnet-dist index` makes one "
            "for existing shards"
        ) from None
    except StorageError as error:
        raise IndexMismatch(str(error)) from None
    except OSError as error:  # for example a folder of that name, or no permission
        raise IndexMismatch(f"{shown(where)}: cannot be read: {error.strerror}") from None
    except KeyError as error:
        if error.args == ("classes",):
            raise IndexMismatch(
                f"{shown(where)}: has no class names; `resnet-dist index {shown(where)}` makes an index that has them"
            ) from None
        raise IndexMismatch(f"{shown(where)}: not an index of shards (no {error})") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise IndexMismatch(
            f"{shown(where)}: not an index of shards ({type(error).__name__}: {error})"
        ) from None


def shards_of(value: dict[str, Any], base: str) -> tuple[Shard, ...]:
    """Return the shards of a wids index. Raises KeyError, TypeError or ValueError where it is not one."""
    shards = tuple(_shard(base, entry) for entry in value["shardlist"])
    if not shards:
        raise ValueError("lists no shards")
    return shards


def _shard(base: str, entry: dict[str, Any]) -> Shard:
    count, num_bytes = int(entry["nsamples"]), int(entry.get("filesize", 0))
    if count < 0 or num_bytes < 0:
        raise ValueError(f"{entry['url']}: nsamples={count} and filesize={num_bytes} cannot be negative")
    checksums = ((name, entry.get(key)) for name, key in (("sha256", "sha256"), ("md5", "md5sum")))
    # Some tools write hexadecimal digits in capitals.
    known = next((f"{name}:{str(digest).strip().lower()}" for name, digest in checksums if digest), "")
    return Shard(join(base, str(entry["url"])), num_bytes, known, count)


def idx_path(path: Path) -> Path:
    """Return the path of the DALI index beside a tar."""
    return path.with_suffix(IDX_SUFFIX)


def check_shards(index: Index) -> None:
    """Compare the size of every tar on this machine with the index, and the first and last header of some hundred.

    This reads little, so that a run can do it at its start. A remote shard is verified when it is fetched. Raises
    IndexMismatch naming the shard.
    """
    every = max(1, len(index.shards) // MAX_HEADERS_CHECKED)
    for number, shard in enumerate(index.shards):
        if is_local(shard.url):
            _check_local(shard, index, headers=number % every == 0)


def _check_local(shard: Shard, index: Index, *, headers: bool) -> None:
    path = local_path(shard.url)
    try:
        num_bytes = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise IndexMismatch(f"{path}: missing, but {index.location} lists it") from None
    except OSError as error:
        raise IndexMismatch(f"{path}: cannot be read: {error.strerror}") from None
    if shard.num_bytes and num_bytes != shard.num_bytes:
        raise IndexMismatch(
            f"{path}: has {num_bytes:,} bytes, but {index.location} records {shard.num_bytes:,}; "
            "prepare the data again, or bring back the shard it was made from"
        )
    if not headers or not is_plain_local(shard) or not idx_path(path).exists():
        return
    try:
        samples = read_idx(idx_path(path))
        if len(samples) != shard.num_samples:
            raise TarError(
                f"{idx_path(path)}: lists {len(samples)} samples, but {index.location} records {shard.num_samples}"
            )
        with path.open("rb") as file:
            for member in (samples[0][0], samples[-1][-1]) if samples else ():
                check_header(file.fileno(), str(path), member)
    except TarError as error:
        raise IndexMismatch(str(error)) from None
    except OSError as error:
        raise IndexMismatch(f"{error.filename or path}: cannot be read: {error.strerror}") from None
