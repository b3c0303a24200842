"""Read one sample by its id, wherever the shards are: sample id → shard and position → offset → bytes."""

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
from resnet_dist.data.storage.urls import shown

# The header of a damaged tar may state any size.
MAX_IMAGE_BYTES = 256 * 2**20
MAX_LABEL_BYTES = 16 * 2**20
# Image and label are read together up to this size; to split a larger read would copy the image once more.
MAX_JOINT_READ_BYTES = 16 * 2**10
MAX_OPEN_FILES = 256  # shards; descriptors are scarce
MAX_TABLES = 8192  # shards; to build a table again costs milliseconds
# Shards whose samples' keys are kept. Bad samples are often in the same shard, and its keys cost as much as a table.
MAX_KEY_LISTS = 8
LABEL_FIELDS = ("label", "cls", "class_id")  # of a .json label, the first that exists


class RawSample(NamedTuple):
    """A sample as it lies in its shard."""

    image: bytes  # encoded
    label: int


class BadSample(Exception):
    """A sample that exists but cannot be used: its image or label is missing, cut off or damaged."""


class ShardReader:
    """The samples of an index by their ids, for any number of threads."""

    def __init__(self, index: Index, limits: CacheLimits) -> None:
        self._index = index
        self._ends = np.cumsum(index.counts)
        self._starts = self._ends - np.array(index.counts)
        self._cache = ShardCache(limits)
        self._lock = threading.Lock()
        self._keys_lock = threading.Lock()
        # The next four are keyed by the number of a shard in the index.
        self._opening: dict[int, threading.Lock] = {}
        self._tables: dict[int, _Table] = {}
        self._files: dict[int, _File] = {}
        self._keys: dict[int, list[str]] = {}

    def locate(self, ids_M: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Return the number of each sample's shard and its position there. A call costs as much as a read: batch it."""
        numbers_M = self._ends.searchsorted(ids_M, side="right")
        return list(zip(numbers_M.tolist(), (ids_M - self._starts[numbers_M]).tolist(), strict=True))

    def read(self, sample_id: int) -> RawSample:
        """Read one sample.

        Raises BadSample; StorageError where the shard cannot be fetched or read; IndexMismatch where it is not the
        shard that was indexed.
        """
        return self.read_at(*self._place_of(sample_id))

    def read_at(self, number: int, position: int) -> RawSample:
        """Read the sample at `position` of shard `number`. Raises the errors of `read`."""
        table, file = self._tables.get(number), self._files.get(number)
        if table is None or file is None:
            table, file = self._open(number)
        return _read(file.fd, *table.places_N5[position].tolist())

    def key(self, sample_id: int) -> str:
        """Return SHARD/KEY of a sample, for messages; its position where the shard cannot be read."""
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
        # One thread at a time: headers are read sequentially, and all threads share the position of the open file.
        with self._keys_lock:
            keys = self._keys.get(number)
            if keys is None:
                keys = [members[0].key for members in load_members(table.path, file.fd)]
                self._keys[number] = keys
                _drop_oldest(self._keys, MAX_KEY_LISTS)
        return keys

    def want(self, numbers: Iterable[int]) -> None:
        """Begin to fetch these shards, in this order."""
        self._cache.want(self._index.shards[number] for number in numbers)

    def close(self) -> None:
        self._cache.close()

    def _place_of(self, sample_id: int) -> tuple[int, int]:
        return self.locate(np.array([sample_id]))[0]

    def _open(self, number: int) -> tuple[_Table, _File]:
        # One lock per shard: two threads must not open the same shard twice, and a thread that waits for a transfer
        # must not block those that read other shards.
        with self._lock:
            opening = self._opening.setdefault(number, threading.Lock())
        with opening:
            table, file = self._tables.get(number), self._files.get(number)
            if table is None or file is None:
                shard = self._index.shards[number]
                file = _File(*self._cache.open(shard))
                table = table or _Table(shard, file)
        with self._lock:
            self._tables[number], self._files[number] = table, file
            # Close files that were evicted from the cache: an open file keeps its space on the disk.
            for evicted in [n for n, f in self._files.items() if os.fstat(f.fd).st_nlink == 0]:
                del self._files[evicted]
            _drop_oldest(self._tables, MAX_TABLES)
            _drop_oldest(self._files, _max_open_files())
        return table, file


def _max_open_files() -> int:
    """Return MAX_OPEN_FILES, or a quarter of this process's descriptors where that is less: macOS allows 256."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_FILES if allowed == resource.RLIM_INFINITY else max(1, min(MAX_OPEN_FILES, allowed // 4))


def _drop_oldest(kept: dict[int, Any], max_kept: int) -> None:
    while len(kept) > max_kept:
        del kept[next(iter(kept))]


class _File:
    """An open tar. It closes when the last reference to it is gone, so a thread that reads it is safe."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd, self.path = fd, path

    def __del__(self) -> None:
        os.close(self.fd)


class _Table:
    """The places of a shard's samples. Raises IndexMismatch where they are not those of the index."""

    def __init__(self, shard: Shard, file: _File) -> None:
        self.path = file.path
        try:
            self.places_N5 = places_of(load_members(file.path, file.fd, keep_idx=not is_plain_local(shard)))
        except TarError as error:
            raise IndexMismatch(f"{shown(shard.url)}: {error}") from None
        if len(self.places_N5) != shard.num_samples:
            raise IndexMismatch(
                f"{shown(shard.url)}: has {len(self.places_N5)} samples, but the index records {shard.num_samples}; index it "
                "again"
            )


def _read(fd: int, image_at: int, image_size: int, label_at: int, label_size: int, is_json: int) -> RawSample:
    """Read a sample at its row of `places_of`. Raises BadSample."""
    if image_size < 0 or label_size < 0:
        raise BadSample(f"has no {'image' if image_size < 0 else 'label (.cls or .json)'}")
    if image_size > MAX_IMAGE_BYTES or label_size > MAX_LABEL_BYTES:
        raise BadSample(f"an image of {image_size:,} bytes with a label of {label_size:,} is not read")
    start = min(image_at, label_at)
    end = max(image_at + image_size, label_at + label_size)
    if end - start <= MAX_JOINT_READ_BYTES:
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
    """Return the members of each sample, from the `.idx` beside the tar, else from the tar's headers.

    keep_idx: write a missing `.idx`. Raises TarError.
    """
    try:
        return read_idx(idx_path(path))
    except FileNotFoundError:
        pass
    with os.fdopen(os.dup(fd), "rb") as file:
        samples = list(group_samples(file, str(path)))
    # Write it in the cache only, for the other ranks of the node: reading must not change a person's folder.
    if keep_idx:
        with contextlib.suppress(OSError):
            write_idx(idx_path(path), samples)
    return samples


def parse_label(label: bytes, *, is_json: bool) -> int:
    """Return the class id in the content of a `.cls` or `.json` member. Raises ValueError."""
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
    """Return the label. Raises ValueError where the index has no class for it."""
    if not 0 <= label < num_classes:
        raise ValueError(f"label {label} is not one of the {num_classes} classes of the index")
    return label
