"""Shards: write samples as WebDataset tars, and read one sample of one by its offset."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from resnet_dist.config import UserError
from resnet_dist.data.index import (
    IMAGE_EXTENSIONS,
    INDEX_NAME,
    LABEL_EXTENSION,
    Index,
    Member,
    Shard,
    index_shard,
    read_idx,
    read_index,
    write_index,
)
from resnet_dist.data.philox import Purpose, permutation
from resnet_dist.data.sources import Item, Source

SHARD_BYTES = 256 * 2**20  # what a large set is cut into: 100 to 500 MB suit object stores and local disks
MIN_SHARDS = 8  # so that several ranks of a small set read different files


def prepare(
    source: Source,
    out: Path,
    *,
    seed: int = 0,
    shards: int | None = None,
    progress: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> dict[str, Index]:
    """Write every split of `source` to `out/SPLIT/` as shuffled shards with an index.

    A split that is complete already (it has an index) is left as it is. Shards are written aside and renamed,
    the index last: an interrupted call leaves no half-written file under a final name, and can be repeated.
    Same source and seed give byte-identical shards. `progress(split, done, total)` is called
    after every shard, in samples.
    """
    indexes = {}
    for split, items in source.splits.items():
        folder = out / split
        if (folder / INDEX_NAME).exists():
            indexes[split] = read_index(folder)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        written: list[Shard] = []
        shuffled = [items[i] for i in permutation(len(items), Purpose.SHARDS, seed=seed)]
        for number, part in enumerate(_cut(shuffled, shards)):
            path = folder / f"{source.name}-{split}-{number:06d}.tar"
            written.append(_write_shard(path, part, first_key=sum(s.num_samples for s in written)))
            progress(split, sum(s.num_samples for s in written), len(items))
        indexes[split] = write_index(folder, written, source.classes)
    return indexes


def _cut(items: Sequence[Item], shards: int | None) -> list[Sequence[Item]]:
    if not items:
        raise UserError("the source has no samples in this split")
    if shards is None:
        mean_bytes = float(np.mean([len(item.read()) for item in items[:100]]))
        shards = max(MIN_SHARDS, round(mean_bytes * len(items) / SHARD_BYTES))
    bounds = np.linspace(0, len(items), min(shards, len(items)) + 1).round().astype(int).tolist()
    return [items[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]


def _write_shard(path: Path, items: Sequence[Item], *, first_key: int) -> Shard:
    from webdataset import TarWriter

    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        # A fixed time and owner, or the same samples would give other bytes tomorrow.
        with TarWriter(file, mtime=0, encoder=False, compress=False, user="", group="") as writer:
            for number, item in enumerate(items, start=first_key):
                writer.write(
                    {
                        "__key__": f"{number:09d}",
                        item.extension: item.read(),
                        LABEL_EXTENSION: b"%d" % item.label,
                    }
                )
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return index_shard(path)


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in its shard."""

    key: str
    image: bytes
    extension: str
    label: int


class BadSample(Exception):
    """A sample that is there but cannot be used: no image, no label, or bytes that are not what they say."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key


class ShardReader:
    """Reads samples by sample id, from any thread: one positioned read for image and label together."""

    def __init__(self, index: Index, *, open_files: int = 64) -> None:
        self._index = index
        self._ends = np.cumsum(index.counts)
        self._lock = threading.Lock()
        self._open = lru_cache(maxsize=open_files)(self._open_uncached)

    def read(self, sample_id: int) -> RawSample:
        """Raises BadSample, or OSError where the file cannot be read."""
        number = int(np.searchsorted(self._ends, sample_id, side="right"))
        position = sample_id - (int(self._ends[number]) - self._index.counts[number])
        with self._lock:  # two threads that miss together would open the file twice
            shard = self._open(number)
        members = shard.samples[position]
        start = members[0].offset
        data = os.pread(shard.fd, members[-1].offset + members[-1].size - start, start)
        return _to_sample(self._index.shards[number], members, data)

    def _open_uncached(self, number: int) -> _OpenShard:
        return _OpenShard(self._index.shards[number])


class _OpenShard:
    """A tar held open. Evicted from the cache, it closes when the last thread that reads it lets go."""

    def __init__(self, shard: Shard) -> None:
        self.samples = read_idx(shard)
        self.fd = os.open(shard.path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def _to_sample(shard: Shard, members: Sequence[Member], data: bytes) -> RawSample:
    """Cut the bytes from the first to the last member of a sample into image and label."""
    key = f"{shard.path.name}/{members[0].name.partition('.')[0]}"
    start = members[0].offset
    parts = {m.extension: data[m.offset - start : m.offset - start + m.size] for m in members}
    extension = next((e for e in parts if e in IMAGE_EXTENSIONS), None)
    if extension is None or LABEL_EXTENSION not in parts:
        raise BadSample(key, f"needs an image and a .{LABEL_EXTENSION}, has {sorted(parts)}")
    try:
        label = int(parts[LABEL_EXTENSION])
    except ValueError:
        raise BadSample(key, f".{LABEL_EXTENSION} is not a number: {parts[LABEL_EXTENSION][:20]!r}") from None
    return RawSample(key, parts[extension], extension, label)
