"""Make an index for shards that another program wrote: read each once, count its samples, compute its checksum."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from resnet_dist.data.shards.index import (
    PREPARED_KEY,
    Index,
    IndexMismatch,
    Shard,
    idx_path,
    index_location,
    read_index,
    write_index,
)
from resnet_dist.data.shards.reader import parse_label
from resnet_dist.data.shards.tar import Member, TarError, find_image, find_label, group_samples, write_idx
from resnet_dist.data.storage.shard_cache import (
    CacheLimits,
    ShardCache,
    check_command,
    difference,
    is_plain_local,
)
from resnet_dist.data.storage.urls import compression_of, is_local, local_path
from resnet_dist.errors import StorageError, UserError
from resnet_dist.system.files import checksum
from resnet_dist.system.threads import thread_pool

MAX_CLASSES = 1_000_000  # without class names; a larger label is an identifier, a time stamp, or damage

Progress = Callable[[int, int], None]  # (shards done, shards in all)


@dataclass(frozen=True)
class ScannedShard:
    """The result of reading one shard."""

    shard: Shard  # with its number of samples, bytes and checksum
    largest_label: int  # -1: no usable label
    problems: list[str] = field(default_factory=list)  # one line per sample without a usable image or label


def build_index(
    shards: Sequence[Shard],
    out: Path,
    limits: CacheLimits,
    *,
    classes: Sequence[str] | None = None,
    workers: int = 4,
    progress: Progress = lambda done, total: None,
) -> tuple[Index, list[str]]:
    """Read every shard once and write an index to `out`, and an `.idx` beside each tar on this machine.

    classes: names, in the order of their labels; None: those of an index that is already at `out`, if they suffice,
    else "0" to the largest label found. workers: threads.
    Returns the index and a line for each sample without a usable image or label: such samples are counted, and
    training warns of each. Raises UserError where a shard cannot be read, or where no sample can be used; then no
    index is written.
    """
    for shard in shards:
        check_command(shard.url, allowed=limits.allow_commands)
    scanned = _scan_all(shards, limits, workers, progress)
    if not any(result.shard.num_samples for result in scanned):
        raise UserError(f"{shards[0].url}: no samples; members must be named KEY.EXTENSION")
    problems = [problem for result in scanned for problem in result.problems]
    highest = max(scanned, key=lambda result: result.largest_label)
    if highest.largest_label < 0:
        raise UserError(f"no sample has an image and a usable label; the first: {problems[0]}")
    if classes is None:
        classes = _known_classes(out, highest.largest_label) or _numbered_classes(highest)
    if highest.largest_label >= len(classes):
        raise UserError(f"--classes: {len(classes)} names, but a label is {highest.largest_label}")
    indexed = [result.shard for result in scanned]
    index = write_index(out, indexed, classes, prepared=_known_preparation(out, indexed))
    return index, problems


def _scan_all(
    shards: Sequence[Shard], limits: CacheLimits, workers: int, progress: Progress
) -> list[ScannedShard]:
    cache = ShardCache(limits, fresh=True)
    scanned: list[ScannedShard] = []
    try:
        with thread_pool(workers, cache.close) as pool:
            for result in pool.map(lambda shard: _scan_shard(shard, cache), shards):
                scanned.append(result)
                progress(len(scanned), len(shards))
    except StorageError as error:
        raise UserError(str(error)) from None
    finally:
        cache.close()
    return scanned


def _scan_shard(shard: Shard, cache: ShardCache) -> ScannedShard:
    """Count and checksum a shard, and write its `.idx` if it is a local tar. Raises TarError or StorageError."""
    fd, path = cache.open(shard)
    with os.fdopen(fd, "rb") as file:
        samples = list(group_samples(file, shard.url))
        if shard.num_samples and shard.num_samples != len(samples):
            raise TarError(
                f"{shard.url}: has {len(samples)} samples, but the index that named it records {shard.num_samples}"
            )
        largest_label, problems = -1, []
        for members in samples:
            try:
                largest_label = max(largest_label, _label_of(members, file.fileno()))
            except ValueError as error:
                problems.append(f"{shard.name}/{members[0].key}: {error}")
    if is_plain_local(shard):
        # Ignore a read-only folder: without an `.idx`, readers find the offsets when they open the tar.
        with contextlib.suppress(OSError):
            write_idx(idx_path(path), samples)
    measured = _measured(shard, path, cache)
    cache.forget(shard)
    return ScannedShard(replace(measured, num_samples=len(samples)), largest_label, problems)


def _label_of(members: Sequence[Member], fd: int) -> int:
    """Return the label of a sample. Raises ValueError where image or label is missing or the label is unusable."""
    image, label = find_image(members), find_label(members)
    if image is None or label is None:
        raise ValueError(f"has no {'label (.cls or .json)' if image else 'image'}")
    number = parse_label(os.pread(fd, label.size, label.offset), is_json=label.is_json)
    if number < 0:
        raise ValueError(f"label {number} is negative")
    return number


def _measured(shard: Shard, path: Path, cache: ShardCache) -> Shard:
    """Return the shard with bytes and checksum of the file as it is stored, compressed or not. Raises TarError."""
    if is_local(shard.url):
        path = local_path(shard.url)
    elif fetched := cache.fetched_checksum(shard):  # the cache keeps no compressed bytes to measure
        return Shard(shard.url, *fetched, shard.num_samples)
    elif compression_of(shard.url):
        return shard
    problem = difference(path, shard)
    if problem:
        raise TarError(f"{shard.url}: {problem}")
    return Shard(shard.url, path.stat().st_size, checksum(path), shard.num_samples)


def _known_classes(out: Path, largest_label: int) -> list[str] | None:
    """Return the class names of the index that will be replaced, if they suffice."""
    try:
        names = list(read_index(out).classes)
    except IndexMismatch:
        return None
    return names if len(names) > largest_label else None


def _numbered_classes(highest: ScannedShard) -> list[str]:
    """Return "0" to the largest label. Raises UserError where that would be too many classes."""
    if highest.largest_label >= MAX_CLASSES:
        raise UserError(
            f"{highest.shard.url}: a label is {highest.largest_label}, which would make as many classes; labels count "
            "from 0, or name the classes with --classes"
        )
    return [str(label) for label in range(highest.largest_label + 1)]


def _known_preparation(out: Path, shards: Sequence[Shard]) -> dict[str, object] | None:
    """Return the options of `prepare` in the index that will be replaced, if `shards` are those that it wrote."""
    try:
        prepared = json.loads(Path(index_location(out)).read_text()).get(PREPARED_KEY)
        before = read_index(out).shards
    except (OSError, ValueError, AttributeError):  # no index, or one of another layout
        return None
    same = [replace(shard, url=shard.name) for shard in before] == [
        replace(shard, url=shard.name) for shard in shards
    ]
    return prepared if same and isinstance(prepared, dict) else None


def num_compressed(shards: Sequence[Shard]) -> int:
    return sum(compression_of(shard.url) is not None for shard in shards)
