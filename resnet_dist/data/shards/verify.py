"""TODO map."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from resnet_dist.data.images.decode import open_image, whole
from resnet_dist.data.shards.build import (
    Progress,
)
from resnet_dist.data.shards.index import (
    IndexMismatch,
    Shard,
    read_index,
)
from resnet_dist.data.shards.reader import BadSample, ShardReader, check_label
from resnet_dist.data.storage.shard_cache import CacheLimits, ShardCache, difference
from resnet_dist.data.storage.urls import compression_of, is_local, local_path
from resnet_dist.errors import UserError


def verify_index(
    location: str, limits: CacheLimits, *, workers: int = 4, progress: Progress = lambda done, total: None
) -> list[str]:
    """Recompute every checksum and decode every image. Returns what is wrong, each with shard and key.

    Remote and compressed shards are fetched, or unpacked, anew: a copy in the cache says nothing of what is there
    now. One that differs from the index is named too.
    """
    index = read_index(location)
    reader, storage = ShardReader(index, limits), ShardCache(limits)
    problems: list[str] = []
    first_ids = list(accumulate(index.counts, initial=0))

    def check(number: int) -> list[str]:
        shard, found = index.shards[number], []
        try:
            if is_local(shard.url):
                problem = difference(local_path(shard.url), shard)
                if problem:
                    return [f"{shard.url}: {problem}"]
            elif problem := _damage_of_copy(shard, storage):
                found.append(f"{shard.url}: the copy in {limits.folder} {problem}; it was fetched anew")
            storage.forget(shard)
            storage.path(shard)  # what is fetched is compared when it comes
            ids = range(first_ids[number], first_ids[number + 1])
            return found + [text for text in (_problem(reader, i, len(index.classes)) for i in ids) if text]
        except (OSError, IndexMismatch) as error:
            return [*found, str(error) if shard.url in str(error) else f"{shard.url}: {error}"]

    try:
        with ThreadPoolExecutor(workers) as pool:
            for done, found in enumerate(pool.map(check, range(len(index.shards))), start=1):
                problems += found
                progress(done, len(index.shards))
    finally:
        reader.close()
        storage.close()
    return problems


def _damage_of_copy(shard: Shard, storage: ShardCache) -> str | None:
    """What is wrong with a remote shard's copy in the cache, where there is one that is kept as it came."""
    unpacked = compression_of(shard.url) or storage.fetched_checksum(shard)
    if unpacked or not storage.is_at_hand(shard):
        return None
    return difference(storage.path(shard), shard)


def _problem(reader: ShardReader, sample_id: int, num_classes: int) -> str | None:
    try:
        sample = reader.read(sample_id)
        check_label(sample.label, num_classes)
        whole(open_image(sample.image, 3))
    except UserError:
        raise
    except (BadSample, ValueError) as problem:
        return f"{reader.key(sample_id)}: {problem}"
    return None
