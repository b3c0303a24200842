"""Read one sample by its id, wherever the shards are: sample id → shard and position → offset → bytes."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data.shards.index import Index, IndexMismatch
from resnet_dist.data.shards.labels import class_ids, parse_label
from resnet_dist.data.shards.members import MAX_IMAGE_BYTES, MAX_LABEL_BYTES, Member
from resnet_dist.data.shards.offsets import idx_path, load_members, write_idx
from resnet_dist.data.shards.tar import TarError, places_of
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.data.storage.shard_cache import ShardCache
from resnet_dist.data.storage.stored_file import is_plain_local
from resnet_dist.data.storage.urls import shown

# Image and label are read together up to this size; to split a larger read would copy the image once more.
MAX_JOINT_READ_BYTES = 16 * 2**10
MAX_OPEN_FILES = 256  # shards; descriptors are scarce
MAX_TABLES = 8192  # shards; to build a table again costs milliseconds
# Shards whose samples' keys are kept. Bad samples are often in the same shard, and its keys cost as much as a table.
MAX_KEY_LISTS = 8


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
        self._class_ids = class_ids(index.classes)
        self._ends = np.cumsum(index.counts)
        self._starts = self._ends - np.array(index.counts)
        self._cache = ShardCache(limits)
        self._lock = threading.Lock()
        self._keys_lock = threading.Lock()
        # The next four are keyed by the number of a shard in the index.
        self._opening: dict[int, threading.Lock] = {}
        self._tables: dict[int, NDArray[np.int64]] = {}  # places_N5 of `places_of`
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
        places_N5, file = self._tables.get(number), self._files.get(number)
        if places_N5 is None or file is None:
            places_N5, file = self._open(number)
        return _read(self._class_ids, file.fd, *places_N5[position].tolist())

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
        _, file = self._open(number)
        # One thread at a time: headers are read sequentially, and all threads share the position of the open file.
        with self._keys_lock:
            keys = self._keys.get(number)
            if keys is None:
                keys = [members[0].key for members in self._members_of(number, file)]
                self._keys[number] = keys
                _drop_oldest(self._keys, MAX_KEY_LISTS)
        return keys

    def _read_places(self, number: int, file: _File) -> NDArray[np.int64]:
        """Return the places of a shard's samples. Raises IndexMismatch where they are not those of the index."""
        shard = self._index.shards[number]
        try:
            places_N5 = places_of(self._members_of(number, file), self._index.rules)
        except TarError as error:
            raise IndexMismatch(f"{shown(shard.url)}: {error}") from None
        if len(places_N5) != shard.num_samples:
            raise IndexMismatch(
                f"{shown(shard.url)}: has {len(places_N5)} samples, but the index records {shard.num_samples}; index it "
                "again"
            )
        return places_N5

    def _members_of(self, number: int, file: _File) -> list[list[Member]]:
        """Return the members of each sample of a shard. Raises TarError."""
        shard, rules = self._index.shards[number], self._index.rules
        if is_plain_local(shard):
            files = self._index.offset_files(number)
        else:  # in the cache, which sets with other rules share
            files = [] if rules.full_keys else [idx_path(file.path)]
        samples, found = load_members(files, file.fd, str(file.path), shard.num_samples, rules)
        # Keep them in the cache only, for the other ranks of the node: reading must not change a person's folder.
        if found is None and files and not is_plain_local(shard):
            with contextlib.suppress(OSError):
                write_idx(files[0], samples)
        return samples

    def want(self, numbers: Iterable[int]) -> None:
        """Begin to fetch these shards, in this order."""
        self._cache.want(self._index.shards[number] for number in numbers)

    def close(self) -> None:
        self._cache.close()

    def _place_of(self, sample_id: int) -> tuple[int, int]:
        return self.locate(np.array([sample_id]))[0]

    def _open(self, number: int) -> tuple[NDArray[np.int64], _File]:
        # One lock per shard: two threads must not open the same shard twice, and a thread that waits for a transfer
        # must not block those that read other shards.
        with self._lock:
            opening = self._opening.setdefault(number, threading.Lock())
        with opening:
            places_N5, file = self._tables.get(number), self._files.get(number)
            if places_N5 is None or file is None:
                file = _File(*self._cache.open(self._index.shards[number]))
                places_N5 = self._read_places(number, file) if places_N5 is None else places_N5
        with self._lock:
            self._tables[number], self._files[number] = places_N5, file
            # Close files that were evicted from the cache: an open file keeps its space on the disk.
            for evicted in [n for n, f in self._files.items() if os.fstat(f.fd).st_nlink == 0]:
                del self._files[evicted]
            _drop_oldest(self._tables, MAX_TABLES)
            _drop_oldest(self._files, _max_open_files())
        return places_N5, file


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


def _read(
    ids: Mapping[str, int],
    fd: int,
    image_at: int,
    image_size: int,
    label_at: int,
    label_size: int,
    is_json: int,
) -> RawSample:
    """Read a sample at its row of `places_of`. ids: class ids by name. Raises BadSample."""
    if image_size < 0 or label_size < 0:
        raise BadSample(f"has no {'image' if image_size < 0 else 'label'}")
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
        return RawSample(image, parse_label(label, is_json=bool(is_json), ids=ids))
    except ValueError as error:
        raise BadSample(str(error)) from None
