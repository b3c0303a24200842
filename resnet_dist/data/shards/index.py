"""The index of a set of shards: the number of samples in each, their checksums, and the names of the classes.

`index.json` follows the wids layout, with checksums and class names added. Beside every tar lies a DALI `.idx` file
with the offset and size of every member. wids and DALI read these files as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from resnet_dist.data.findings import printable
from resnet_dist.data.shards.members import WEBDATASET, MemberRules
from resnet_dist.data.shards.offsets import beside_index, fitting, is_dali_index, offset_files
from resnet_dist.data.shards.tar import TarError, group_samples
from resnet_dist.data.storage.stored_file import StoredFile, difference, is_plain_local
from resnet_dist.data.storage.transfer import read_bytes
from resnet_dist.data.storage.urls import (
    COMMAND,
    folder_of,
    is_http,
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
from resnet_dist.system.redact import redact

INDEX_NAME = "index.json"
# Our index in a folder where another program's file has INDEX_NAME.
SECOND_INDEX_NAME = "index.resnet-dist.json"
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
    rules: MemberRules = WEBDATASET  # They group the members of its shards into samples.

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

    def offset_files(self, number: int) -> list[Path]:
        """Return the files that may hold the offsets of a plain local shard, in the order in which they are tried."""
        files = offset_files(local_path(self.shards[number].url), self.rules)
        if is_local(self.location):
            files.insert(0, beside_index(local_path(self.location), number))
        return files

    def digest(self) -> str:
        """Return the SHA-256 of names, counts, sizes and checksums of the shards, of class names and of the rules.

        It is equal on every rank that sees the same data.
        """
        text = "".join(f"{s.name} {s.num_samples} {s.num_bytes} {s.checksum}\n" for s in self.shards)
        text += "\0".join(self.classes)
        if rules := self.rules.as_json():
            text += json.dumps(rules, sort_keys=True)
        return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def write_index(
    location: Path,
    shards: Sequence[Shard],
    classes: Sequence[str],
    prepared: Mapping[str, object] | None = None,
    rules: MemberRules = WEBDATASET,
) -> Index:
    """Write the index and return it.

    The file appears in one rename, so a folder with an index is complete. Shards under the index's own folder are
    named relative to it, so that the folder can be moved; a web address is written without user and password.
    prepared: the options of `resnet-dist prepare`.
    """
    path = Path(index_location(location))
    entries = []
    for shard in shards:
        entry = {
            "url": relative_name(shard.url, path.parent),
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
        **rules.as_json(),
    }
    if prepared is not None:
        value[PREPARED_KEY] = dict(prepared)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(value, indent=1) + "\n")
    if any(_has_secret(without_user(shard.url)) for shard in shards):
        path.chmod(0o600)  # The secrets are needed here, to fetch the shards, but by nobody else.
    return Index(str(path), tuple(shards), tuple(classes), rules)


def _has_secret(url: str) -> bool:
    """Report whether a URL or command has a password or signature. Not every parameter of a web address is one."""
    return not is_local(url) and (unsigned(url) != url if is_http(url) else redact(url) != url)


def relative_name(url: str, folder: Path) -> str:
    """Return a shard's name in an index in `folder`: relative to it where the shard lies under it, else absolute."""
    if not is_local(url):
        return without_user(url)
    path, folder = local_path(url).absolute(), folder.absolute()
    # Follow links second: the link itself may lie in the folder, and what it leads to elsewhere. A name with .. means
    # another folder behind a link than its text says.
    pairs = [(path, folder)] if ".." not in (*path.parts, *folder.parts) else []
    pairs.append((path.parent.resolve() / path.name, folder.resolve()))
    for shard, base in pairs:
        if shard.is_relative_to(base):
            name = str(shard.relative_to(base))
            return f"./{name}" if name.startswith(COMMAND) else name
    return str(path)


def index_location(location: str | Path) -> str:
    """Return the path or URL of the index file: `location` itself, or the file in that folder.

    The query of a web address stays behind the name of the file, and `join` passes it on to the shards.
    """
    text = str(location)
    return text if path_of(text).endswith(".json") else join(text, INDEX_NAME)


def read_index(location: str | Path, read: Callable[[str], bytes] = read_bytes) -> Index:
    """Read the index of a folder or URL, or an index file. Raises IndexMismatch where it is missing or not one.

    read: returns the content of the file at a path or URL.
    """
    where = index_location(location)
    try:
        return _read_file(where, read)
    except IndexMismatch:
        # Another program's index.json, beside which ours has its second name.
        if str(location) != where:
            with contextlib.suppress(IndexMismatch):
                return _read_file(join(str(location), SECOND_INDEX_NAME), read)
        raise


def _read_file(where: str, read: Callable[[str], bytes]) -> Index:
    try:
        value = json.loads(read(where))
        shards = shards_of(value, folder_of(where))
        classes = tuple(printable(str(name)) for name in value["classes"])
        return Index(where, shards, classes, MemberRules.from_json(value))
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


def check_shards(index: Index) -> None:
    """Compare the size of every tar on this machine with the index, and some headers of some hundred.

    This reads little, so that a run can do it at its start. A remote shard is verified when it is fetched. Raises
    IndexMismatch naming the shard.
    """
    every = max(1, len(index.shards) // MAX_HEADERS_CHECKED)
    for number, shard in enumerate(index.shards):
        if is_local(shard.url):
            _check_size(shard, index)
            if number % every == 0 and is_plain_local(shard):
                _check_offsets(number, index)


def _check_size(shard: Shard, index: Index) -> None:
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


def _check_offsets(number: int, index: Index) -> None:
    """Raise IndexMismatch where the offsets beside a shard do not fit it and it is not the shard that was indexed."""
    shard = index.shards[number]
    path, files = local_path(shard.url), index.offset_files(number)
    if not any(is_dali_index(file) for file in files):
        return  # nothing but the tar itself is read
    try:
        with path.open("rb") as file:
            if any(fitting(known, file.fileno(), shard.num_samples) is not None for known in files):
                return
            # Either the tar is another one than was indexed, or the offsets are another program's.
            problem = difference(path, shard) if shard.checksum else None
            if problem is None and not shard.checksum:
                found = sum(1 for _ in group_samples(file, str(path), index.rules))
                if found != shard.num_samples:
                    problem = f"has {found} samples, but {index.location} records {shard.num_samples}"
    except TarError as error:
        raise IndexMismatch(str(error)) from None
    except OSError as error:
        raise IndexMismatch(f"{error.filename or path}: cannot be read: {error.strerror}") from None
    if problem is not None:
        raise IndexMismatch(f"{path}: {problem}; index it again, or bring back the shard it was made from")
