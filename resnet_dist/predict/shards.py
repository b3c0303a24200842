"""Images inside tars: one of each sample, with or without labels."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from resnet_dist.config import Data
from resnet_dist.data.findings import BAD_SHARD, Findings, one_line
from resnet_dist.data.shards.index import Index, Shard
from resnet_dist.data.shards.members import MAX_IMAGE_BYTES, WEBDATASET, Member, MemberRules
from resnet_dist.data.shards.offsets import load_members, offset_files
from resnet_dist.data.shards.tar import TarError
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.data.storage.shard_cache import ShardCache
from resnet_dist.data.storage.stored_file import is_plain_local
from resnet_dist.data.storage.urls import is_local, local_path
from resnet_dist.errors import StorageError
from resnet_dist.predict.unread import Input


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


@dataclass(frozen=True)
class AnywhereMember:
    """A member of a tar, for a process that has not opened it: calling this reads it."""

    shard: Shard
    limits: CacheLimits
    member: Member

    def __call__(self) -> bytes:
        try:
            return _tars(self.limits).open(self.shard).read(self.member)
        except StorageError as problem:
            raise ValueError(str(problem)) from None


class OpenTars:
    """The tars that threads of this process read, opened by one cache of shards."""

    def __init__(self, limits: CacheLimits) -> None:
        self._cache = ShardCache(limits)
        # Neighbouring samples are in the same tar.
        self.open = lru_cache(maxsize=8)(lambda shard: OpenTar(self._cache.open(shard)[0]))

    def close(self) -> None:
        self._cache.close()


_making = threading.Lock()
_made: dict[CacheLimits, OpenTars] = {}


def _tars(limits: CacheLimits) -> OpenTars:
    """Return the open tars of this process: those of the newest limits, made once whatever threads ask."""
    with _making:
        if limits not in _made:
            for tars in _made.values():
                tars.close()
            _made.clear()
            _made[limits] = OpenTars(limits)
        return _made[limits]


def images_of_shards(
    shards: Sequence[Shard], data: Data, findings: Findings, index: Index | None = None
) -> Iterator[Input]:
    """Yield the image of each sample, in the order of the shards; members that are none are recorded.

    index: that of the shards, whose rules and offsets are used. Without it, each image is yielded of a key that several
    share with dotted extensions. A shard that cannot be read becomes one input, which cannot be read.
    """
    rules = WEBDATASET if index is None else index.rules
    limits = CacheLimits.of(data)
    cache = ShardCache(limits)
    try:
        for number, shard in enumerate(shards):
            cache.want(shards[number : number + 2])  # The next one is fetched while this one is read.
            files = [] if index is None or not is_plain_local(shard) else index.offset_files(number)
            try:
                tar, samples, in_tar = _open(shard, cache, rules, files)
            except (StorageError, TarError) as problem:
                yield Input(one_line(shard.name), partial(_refuse, f"{BAD_SHARD}: {problem}"))
                continue
            _record_others(shard.name, in_tar, findings)
            place = (
                replace(shard, url=str(local_path(shard.url).absolute())) if is_local(shard.url) else shard
            )
            anywhere = partial(AnywhereMember, place, limits)
            yield from _images_of(shard.name, tar, anywhere, samples, rules, findings, split=index is None)
    finally:
        cache.close()


def _open(
    shard: Shard, cache: ShardCache, rules: MemberRules, files: list[Path]
) -> tuple[OpenTar, list[list[Member]], Findings]:
    """Return an open shard, the members of its samples, and those of none.

    Raises StorageError, or TarError where it is damaged.
    """
    fd, path = cache.open(shard)
    tar = OpenTar(fd)
    if not files and is_plain_local(shard):
        files = offset_files(local_path(shard.url), rules)
    in_tar = Findings()
    samples, _ = load_members(files, fd, str(path), shard.num_samples, rules, in_tar)
    return tar, samples, in_tar


def _refuse(problem: str) -> bytes:
    raise ValueError(problem)


def _record_others(name: str, in_tar: Findings, findings: Findings) -> None:
    """Record the members of a tar that are in no sample."""
    for found, all_found in (
        (in_tar.left_out, findings.left_out),
        (in_tar.passed_over, findings.passed_over),
    ):
        all_found += [replace(finding, name=f"{name}/{finding.name}") for finding in found]


def _images_of(
    name: str,
    tar: OpenTar,
    anywhere: Callable[[Member], AnywhereMember],
    samples: list[list[Member]],
    rules: MemberRules,
    findings: Findings,
    *,
    split: bool,
) -> Iterator[Input]:
    for members in samples:
        image = rules.image(members)
        if image is None:
            findings.pass_over(f"{name}/{members[0].key}", "a sample without an image")
            continue
        images = rules.images(members)
        # IMG.2024.01.jpg and IMG.2024.02.jpg share a key: by webdataset's rule one of them would be lost.
        if split and len(images) > 1 and "." in image.extension:
            for one in images:
                full_key = one.name[: -1 - len(one.last_extension)]
                yield Input(
                    one_line(f"{name}/{full_key}"),
                    partial(tar.read, one),
                    one.size,
                    read_anywhere=anywhere(one),
                )
            continue
        yield Input(
            one_line(f"{name}/{image.key}"),
            partial(tar.read, image),
            image.size,
            read_anywhere=anywhere(image),
        )
        for other in images:
            if other is not image:
                findings.pass_over(f"{name}/{other.name}", "another image of a sample, which is not read")
