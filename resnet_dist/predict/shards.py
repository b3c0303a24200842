"""Images inside tars: one of each sample, with or without labels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from resnet_dist.config import Data
from resnet_dist.data.findings import Findings, one_line
from resnet_dist.data.shards.index import Index, Shard
from resnet_dist.data.shards.members import MAX_IMAGE_BYTES, WEBDATASET, Member, MemberRules
from resnet_dist.data.shards.offsets import load_members, offset_files
from resnet_dist.data.shards.tar import TarError
from resnet_dist.data.storage.shard_cache import CacheLimits, ShardCache, is_plain_local
from resnet_dist.data.storage.urls import local_path
from resnet_dist.errors import StorageError
from resnet_dist.predict.inputs import Input


class OpenTar:
    """An open tar. It closes when the last image that is read from it is gone."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)

    def read(self, member: Member) -> bytes:
        """Return the bytes of a member. Raises ValueError where there are not as many as its header states."""
        if member.size > MAX_IMAGE_BYTES:
            raise ValueError(f"an image of {member.size:,} bytes is not read")
        data = os.pread(self.fd, member.size, member.offset)
        if len(data) != member.size:
            raise ValueError("the shard ends before it")
        return data


def images_of_shards(
    shards: Sequence[Shard], data: Data, findings: Findings, index: Index | None = None
) -> Iterator[Input]:
    """Yield the image of each sample, in the order of the shards; samples without one are recorded.

    index: that of the shards, whose rules and offsets are used. A shard that cannot be read is recorded as left out.
    """
    rules = WEBDATASET if index is None else index.rules
    cache = ShardCache(CacheLimits.of(data))
    try:
        for number, shard in enumerate(shards):
            cache.want(shards[number : number + 2])  # The next one is fetched while this one is read.
            files = [] if index is None or not is_plain_local(shard) else index.offset_files(number)
            try:
                tar, samples = _open(shard, cache, rules, files)
            except (StorageError, TarError) as problem:
                findings.leave_out(one_line(shard.name), "a shard that cannot be read", str(problem))
                continue
            yield from _images_of(shard.name, tar, samples, rules, findings)
    finally:
        cache.close()


def _open(
    shard: Shard, cache: ShardCache, rules: MemberRules, files: list[Path]
) -> tuple[OpenTar, list[list[Member]]]:
    """Return an open shard and the members of its samples. Raises StorageError, or TarError where it is damaged."""
    fd, path = cache.open(shard)
    tar = OpenTar(fd)
    if not files and is_plain_local(shard):
        files = offset_files(local_path(shard.url), rules)
    samples, _ = load_members(files, fd, str(path), shard.num_samples, rules)
    return tar, samples


def _images_of(
    name: str, tar: OpenTar, samples: list[list[Member]], rules: MemberRules, findings: Findings
) -> Iterator[Input]:
    for members in samples:
        image = rules.image(members)
        if image is None:
            findings.pass_over(f"{name}/{members[0].key}", "a sample without an image")
        else:
            yield Input(one_line(f"{name}/{image.key}"), partial(tar.read, image), image.size)
