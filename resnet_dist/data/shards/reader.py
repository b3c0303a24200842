"""Shards: read one sample by its id, wherever the shards are."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data.shards.index import Index, IndexMismatch, Shard, idx_path
from resnet_dist.data.shards.tar import Member, TarError, group_samples, places_of, read_idx, write_idx
from resnet_dist.data.storage.shard_cache import CacheLimits, ShardCache, is_plain_local

MAX_IMAGE_BYTES = 256 * 2**20  # of one encoded image; a tar may claim anything
NEAR_BYTES = 16 * 2**10  # a small sample is read at once; to cut a large one apart would copy it again
MAX_LABEL_BYTES = 16 * 2**20
MAX_OPEN_FILES, MAX_OPEN_TABLES = (
    256,
    8192,
)  # kept open: descriptors are scarce, and a table costs milliseconds
MAX_NAMED = (
    8  # shards whose samples' keys are kept: bad samples come in crowds, and keys cost as much as a table
)
LABEL_FIELDS = ("label", "cls", "class_id")  # where a .json may have it


class RawSample(NamedTuple):
    """One sample as it lies in its shard."""

    image: bytes
    label: int


class BadSample(Exception):
    """A sample that is there but cannot be used: no image, no label, or bytes that are not what they say."""


class ShardReader:
    """Reads samples by sample id, from any thread: by offset, image and label together."""

    def __init__(self, index: Index, limits: CacheLimits) -> None:
        self._index = index
        self._ends = np.cumsum(index.counts)
        self._starts = self._ends - np.array(index.counts)
        self._storage = ShardCache(limits)
        self._lock = threading.Lock()
        self._naming = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}
        self._tables: dict[int, _Table] = {}
        self._files: dict[int, _File] = {}
        self._keys: dict[int, list[str]] = {}

    def locate(self, ids_M: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Of each sample: the number of its shard, and its position there. One call for many: it costs as a read."""
        numbers_M = self._ends.searchsorted(ids_M, side="right")
        return list(zip(numbers_M.tolist(), (ids_M - self._starts[numbers_M]).tolist(), strict=True))

    def read(self, sample_id: int) -> RawSample:
        """Raises BadSample; StorageError where the shard cannot be had, IndexMismatch where it is another one."""
        return self.read_at(*self._place_of(sample_id))

    def read_at(self, number: int, position: int) -> RawSample:
        """As `read`, of the sample at `position` of shard `number`."""
        table, file = self._tables.get(number), self._files.get(number)
        if table is None or file is None:
            table, file = self._open(number)
        return _read(file.fd, *table.places_N5[position].tolist())

    def key(self, sample_id: int) -> str:
        """SHARD/KEY of a sample, for messages. Never raises."""
        number, position = self._place_of(sample_id)
        name = self._index.shards[number].name
        try:
            return f"{name}/{self._keys_of(number)[position]}"
        except (OSError, ValueError, IndexError):
            return f"{name}, sample {position}"

    def _keys_of(self, number: int) -> list[str]:
        keys = self._keys.get(number)
        if keys is not None:
            return keys
        table, file = self._open(number)
        with self._naming:  # headers are read through the file's one position
            keys = self._keys.get(number)  # another thread's, meanwhile
            if keys is None:
                keys = [members[0].key for members in load_members(table.path, file.fd)]
                self._keys[number] = keys
                _drop_oldest(self._keys, MAX_NAMED)
        return keys

    def want(self, numbers: Iterable[int]) -> None:
        """Begin to fetch these shards, in this order."""
        self._storage.want(self._index.shards[number] for number in numbers)

    def close(self) -> None:
        self._storage.close()

    def _place_of(self, sample_id: int) -> tuple[int, int]:
        return self.locate(np.array([sample_id]))[0]

    def _open(self, number: int) -> tuple[_Table, _File]:
        # Two threads that miss together would open the file twice; a thread that waits for a shard to be
        # fetched must not hold up those that read others.
        with self._lock:
            opening = self._opening.setdefault(number, threading.Lock())
        with opening:
            table, file = self._tables.get(number), self._files.get(number)
            if table is None or file is None:
                shard = self._index.shards[number]
                file = _File(*self._storage.open(shard))
                table = table or _Table(shard, file)
        with self._lock:
            self._tables[number], self._files[number] = table, file
            # Evicted from the shard cache, but held open, a file would go on taking its space.
            for evicted in [n for n, f in self._files.items() if os.fstat(f.fd).st_nlink == 0]:
                del self._files[evicted]
            _drop_oldest(self._tables, MAX_OPEN_TABLES)
            _drop_oldest(self._files, _max_open_files())
        return table, file


def _max_open_files() -> int:
    """A quarter of the descriptors that this process may have, at most: macOS gives 256."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_FILES if allowed == resource.RLIM_INFINITY else max(1, min(MAX_OPEN_FILES, allowed // 4))


def _drop_oldest(kept: dict[int, Any], most: int) -> None:
    while len(kept) > most:
        del kept[next(iter(kept))]


class _File:
    """A tar held open. Dropped, it closes when the last thread that reads it lets go."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd, self.path = fd, path

    def __del__(self) -> None:
        os.close(self.fd)


class _Table:
    """Where the samples of a shard lie. Raises IndexMismatch where they are not those of the index."""

    def __init__(self, shard: Shard, file: _File) -> None:
        self.path = file.path
        try:
            self.places_N5 = places_of(load_members(file.path, file.fd, keep_idx=not is_plain_local(shard)))
        except TarError as error:
            raise IndexMismatch(f"{shard.url}: {error}") from None
        if len(self.places_N5) != shard.num_samples:
            raise IndexMismatch(
                f"{shard.url}: has {len(self.places_N5)} samples, but the index says {shard.num_samples}; index it "
                "again"
            )


def _read(fd: int, image_at: int, image_size: int, label_at: int, label_size: int, is_json: int) -> RawSample:
    if image_size < 0 or label_size < 0:
        raise BadSample(f"has no {'image' if image_size < 0 else 'label (.cls or .json)'}")
    if image_size > MAX_IMAGE_BYTES or label_size > MAX_LABEL_BYTES:
        raise BadSample(f"an image of {image_size:,} bytes with a label of {label_size:,} is not read")
    start = min(image_at, label_at)
    end = max(image_at + image_size, label_at + label_size)
    if end - start <= NEAR_BYTES:
        data = os.pread(fd, end - start, start)
        image = data[image_at - start : image_at - start + image_size]
        label = data[label_at - start : label_at - start + label_size]
    else:
        image, label = os.pread(fd, image_size, image_at), os.pread(fd, label_size, label_at)
    if len(image) != image_size or len(label) != label_size:
        raise BadSample("the shard ends before it")
    try:
        return RawSample(image, parse_label(label, is_json=bool(is_json)))
    except ValueError as error:
        raise BadSample(str(error)) from None


def load_members(path: Path, fd: int, *, keep_idx: bool = False) -> list[list[Member]]:
    """From the `.idx` beside a tar, or where there is none from the tar's headers. Raises TarError."""
    try:
        return read_idx(idx_path(path))
    except FileNotFoundError:
        pass
    with os.fdopen(os.dup(fd), "rb") as file:
        samples = list(group_samples(file, str(path)))
    if keep_idx:  # in our cache, for the node's other ranks; a person's folder is left as it is
        with contextlib.suppress(OSError):
            write_idx(idx_path(path), samples)
    return samples


def parse_label(label: bytes, *, is_json: bool) -> int:
    """A class id from a `.cls` or a `.json` member. Raises ValueError."""
    if not is_json:
        try:
            return int(label)
        except ValueError:
            raise ValueError(f".cls is not a number: {label[:20]!r}") from None
    try:
        value = json.loads(label)
    except (ValueError, RecursionError) as error:
        raise ValueError(f".json cannot be read: {error}") from None
    fields = value if isinstance(value, dict) else {}
    found = next((fields[name] for name in LABEL_FIELDS if name in fields), None)
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError(f".json has no whole number as {', '.join(LABEL_FIELDS[:-1])} or {LABEL_FIELDS[-1]}")
    return found


def check_label(label: int, num_classes: int) -> int:
    """Raise ValueError for a label that the index has no class for."""
    if not 0 <= label < num_classes:
        raise ValueError(f"label {label} is not one of the {num_classes} classes of the index")
    return label
