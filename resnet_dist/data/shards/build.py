"""Make an index for shards that something else wrote, and verify one against what the shards hold."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from resnet_dist.data.shards.index import (
    Index,
    IndexMismatch,
    Shard,
    idx_path,
    index_location,
    read_index,
    write_index,
)
from resnet_dist.data.shards.reader import parse_label
from resnet_dist.data.shards.tar import TarError, find_image, find_label, group_samples, write_idx
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

MAX_CLASSES = 1_000_000  # without names for them: a label beyond is an id, a time, or damage

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """What reading one shard brought."""

    shard: Shard
    largest_label: int
    problems: list[str] = field(default_factory=list)  # samples without a usable image or label


def build_index(
    shards: Sequence[Shard],
    out: Path,
    limits: CacheLimits,
    *,
    classes: Sequence[str] | None = None,
    workers: int = 4,
    progress: Progress = lambda done, total: None,
) -> tuple[Index, list[str]]:
    """Read every shard once and write an index to `out`, with an `.idx` beside tars that are here.

    classes: names, in the order of their labels; None: "0" to the largest label found. The second value lists
    samples that have no image or no label; they are counted, and each costs a warning in training.
    Raises UserError naming the shard where one cannot be read, or where no sample can be used; writes no index then.
    """
    for shard in shards:
        check_command(shard.url, allowed=limits.allow_commands)
    storage = ShardCache(limits, fresh=True)
    found: list[Found] = []
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                for result in pool.map(lambda shard: read_shard(shard, storage), shards):
                    found.append(result)
                    progress(len(found), len(shards))
            finally:
                pool.shutdown(cancel_futures=True)
    except StorageError as error:
        raise UserError(str(error)) from None
    finally:
        storage.close()
    if not any(result.shard.num_samples for result in found):
        raise UserError(f"{shards[0].url}: no samples; members must be named KEY.EXTENSION")
    result = max(found, key=lambda result: result.largest_label)
    largest = result.largest_label
    problems = [problem for result in found for problem in result.problems]
    if largest < 0:
        raise UserError(f"no sample has an image and a usable label; the first: {problems[0]}")
    if classes is None:
        classes = _known_classes(out, largest)
    if classes is None and largest >= MAX_CLASSES:
        raise UserError(
            f"{result.shard.url}: a label is {largest}, which would make as many classes; labels count from 0, or "
            "say --classes"
        )
    if classes is None:
        classes = [str(label) for label in range(largest + 1)]
    if largest >= len(classes):
        raise UserError(f"--classes: {len(classes)} names, but a label is {largest}")
    now = [result.shard for result in found]
    index = write_index(out, now, classes, prepared=_known_preparation(out, now))
    return index, problems


def _known_classes(out: Path, largest: int) -> list[str] | None:
    """Names that the index had which is written anew, where they still suffice."""
    try:
        names = list(read_index(out).classes)
    except IndexMismatch:
        return None
    return names if len(names) > largest else None


def _known_preparation(out: Path, shards: Sequence[Shard]) -> dict[str, object] | None:
    """What `prepare` noted in the index that is written anew, while these are the shards that it wrote."""
    try:
        noted = json.loads(Path(index_location(out)).read_text()).get("prepared")
        before = read_index(out).shards
    except (OSError, ValueError, AttributeError):  # no index, or none of ours
        return None
    same = [replace(shard, url=shard.name) for shard in before] == [
        replace(shard, url=shard.name) for shard in shards
    ]
    return noted if same and isinstance(noted, dict) else None


def read_shard(shard: Shard, storage: ShardCache) -> Found:
    """Count and checksum a shard, and write its `.idx` where it lies here. Raises TarError, StorageError."""
    fd, path = storage.open(shard)
    with os.fdopen(fd, "rb") as file:
        samples = list(group_samples(file, shard.url))
        if shard.num_samples and shard.num_samples != len(samples):
            raise TarError(
                f"{shard.url}: has {len(samples)} samples, but the index that named it says {shard.num_samples}"
            )
        largest, problems = -1, []
        for members in samples:
            image, label = find_image(members), find_label(members)
            key = f"{shard.name}/{members[0].key}"
            if image is None or label is None:
                problems.append(f"{key}: has no {'label (.cls or .json)' if image else 'image'}")
                continue
            try:
                text = os.pread(file.fileno(), label.size, label.offset)
                number = parse_label(text, is_json=label.is_json)
                if number < 0:
                    raise ValueError(f"label {number} is negative")
                largest = max(largest, number)
            except ValueError as error:
                problems.append(f"{key}: {error}")
    if is_plain_local(shard):
        with contextlib.suppress(OSError):  # a folder that is only read: offsets are found when it is opened
            write_idx(idx_path(path), samples)
    known = _measured(shard, path, storage)
    storage.forget(shard)
    return Found(replace(known, num_samples=len(samples)), largest, problems)


def _measured(shard: Shard, path: Path, storage: ShardCache) -> Shard:
    """With size and checksum, of the file as it is stored."""
    if is_local(shard.url):
        path = local_path(shard.url)
    elif fetched := storage.fetched_checksum(shard):  # the compressed bytes themselves are gone
        return Shard(shard.url, *fetched, shard.num_samples)
    elif compression_of(shard.url):
        return shard
    problem = difference(path, shard)
    if problem:
        raise TarError(f"{shard.url}: {problem}")
    return Shard(shard.url, path.stat().st_size, checksum(path), shard.num_samples)


def compressed(shards: Sequence[Shard]) -> int:
    return sum(compression_of(shard.url) is not None for shard in shards)
