"""Verify an index against what its shards hold now: every checksum, every image, every label."""

from __future__ import annotations

from itertools import accumulate

from resnet_dist.config.data.reading import MAX_PIXELS
from resnet_dist.data.images.decode import open_image, whole
from resnet_dist.data.shards.build import Progress
from resnet_dist.data.shards.index import Index, Shard, read_index
from resnet_dist.data.shards.labels import check_label
from resnet_dist.data.shards.offsets import load_members
from resnet_dist.data.shards.reader import BadSample, ShardReader
from resnet_dist.data.shards.tar import group_samples
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.data.storage.shard_cache import ShardCache
from resnet_dist.data.storage.stored_file import difference, is_plain_local
from resnet_dist.data.storage.urls import is_local, local_path
from resnet_dist.errors import UserError
from resnet_dist.system.threads import thread_pool


def verify_index(
    location: str,
    limits: CacheLimits,
    *,
    workers: int = 4,
    progress: Progress = lambda done, total: None,
    max_pixels: int = MAX_PIXELS,
) -> list[str]:
    """Recompute every checksum, decode every image and compare the offsets beside every local tar with the tar.

    Returns a line for each problem, with shard and key.

    Remote shards are fetched and compressed ones unpacked again, because a copy in the cache may be older than the
    shard. A copy that differs from the index is a problem too. Raises IndexMismatch where there is no index.
    workers: threads. max_pixels: as `data.max_pixels` of a recipe.
    """
    index = read_index(location)
    reader, cache = ShardReader(index, limits), ShardCache(limits)
    problems: list[str] = []
    first_ids = list(accumulate(index.counts, initial=0))

    def problem_of(sample_id: int) -> str | None:
        return _problem(reader, sample_id, len(index.classes), max_pixels)

    def check(number: int) -> list[str]:
        shard, found = index.shards[number], []
        try:
            if is_local(shard.url):
                problem = difference(local_path(shard.url), shard)
                if problem:
                    return [f"{shard.url}: {problem}"]
            elif problem := _damage_of_copy(shard, cache):
                found.append(f"{shard.url}: the copy in {limits.folder} {problem}; it was fetched anew")
            cache.forget(shard)
            cache.path(shard)  # fetches the shard, and verifies it before it is in the cache
            if problem := _wrong_offsets(number, index):
                return [*found, problem]
            ids = range(first_ids[number], first_ids[number + 1])
            return found + [text for text in (problem_of(i) for i in ids) if text]
        except (OSError, UserError) as error:  # IndexMismatch and TarError are UserErrors
            return [*found, str(error) if shard.url in str(error) else f"{shard.url}: {error}"]

    try:
        with thread_pool(workers, reader.close, cache.close) as pool:
            for done, found in enumerate(pool.map(check, range(len(index.shards))), start=1):
                problems += found
                progress(done, len(index.shards))
    finally:
        reader.close()
        cache.close()
    return problems


def _damage_of_copy(shard: Shard, cache: ShardCache) -> str | None:
    """Return how a remote shard's copy in the cache differs from the index; None where it agrees or is missing.

    An unpacked copy cannot be compared: the index records the checksum of the compressed bytes.
    """
    if cache.fetched_checksum(shard) or not cache.is_at_hand(shard):
        return None
    return difference(cache.path(shard), shard)


def _wrong_offsets(number: int, index: Index) -> str | None:
    """Return the first sample whose offsets beside a plain local tar are not those in the tar; None without one."""
    shard = index.shards[number]
    if not is_plain_local(shard):
        return None
    with local_path(shard.url).open("rb") as file:
        in_tar = list(group_samples(file, shard.url, index.rules))
        in_file, source = load_members(
            index.offset_files(number), file.fileno(), shard.url, shard.num_samples, index.rules
        )
    wrong = next((ours for ours, theirs in zip(in_tar, in_file, strict=False) if ours != theirs), None)
    if wrong is None or source is None:
        return None
    return f"{source}: does not have the offsets of {shard.name}/{wrong[0].key}; index the shards again"


def _problem(reader: ShardReader, sample_id: int, num_classes: int, max_pixels: int) -> str | None:
    """Return why a sample cannot be used; None where it can. Raises UserError where the shard cannot be read."""
    try:
        sample = reader.read(sample_id)
        check_label(sample.label, num_classes)
        whole(open_image(sample.image, 3, max_pixels))
    except UserError:
        raise
    except (BadSample, ValueError) as problem:
        return f"{reader.key(sample_id)}: {problem}"
    return None
