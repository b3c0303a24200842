"""Read one shard: its samples, labels and checksum, and an account of what in it cannot be used."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from resnet_dist.data.findings import Findings, one_line
from resnet_dist.data.images.formats import IMAGE_EXTENSIONS
from resnet_dist.data.shards.index import Shard
from resnet_dist.data.shards.labels import LabelError, parse_label
from resnet_dist.data.shards.members import MAX_IMAGE_BYTES, MAX_LABEL_BYTES, Member, MemberRules
from resnet_dist.data.shards.offsets import Kept, keep_offsets
from resnet_dist.data.shards.tar import TarError, group_samples
from resnet_dist.data.storage.shard_cache import ShardCache
from resnet_dist.data.storage.stored_file import difference, is_plain_local
from resnet_dist.data.storage.urls import is_local, local_path, shown
from resnet_dist.errors import UserError
from resnet_dist.system.files import checksum

MAX_NAMES = 3  # members that a message names
APART = "its label lies elsewhere in the tar: members of a sample must lie together (tar --sort=name)"
OTHER_FOLDER = (
    "its label lies in another folder of the tar: members of a sample need the same folder and name"
)


@dataclass(frozen=True)
class ScannedShard:
    """The result of reading one shard."""

    shard: Shard  # with its number of samples, bytes and checksum
    labels: frozenset[int]  # those of the samples that can be used
    findings: Findings = field(default_factory=Findings)


@dataclass(frozen=True)
class Scanner:
    """The settings that the scans of all shards of a set share."""

    cache: ShardCache
    rules: MemberRules
    class_ids: Mapping[str, int]  # by name, for labels that are words
    record_new: Callable[[Path], None]  # called for each offsets file that did not exist before

    @cached_property
    def _image_extensions(self) -> frozenset[str]:
        return frozenset((*IMAGE_EXTENSIONS, *self.rules.image_extensions))

    def scan(self, shard: Shard, beside: Path) -> ScannedShard:
        """Count and checksum a shard, and keep its offsets if it is a plain local tar.

        beside: the file for its offsets where its folder cannot be written. Raises UserError where it is damaged or
        its members make no samples, StorageError where it cannot be fetched or read.
        """
        fd, path = self.cache.open(shard)
        in_tar, findings = Findings(), Findings()
        with os.fdopen(fd, "rb") as file:
            samples = list(group_samples(file, shown(shard.url), self.rules, in_tar))
            if shard.num_samples and shard.num_samples != len(samples):
                raise TarError(
                    f"{shown(shard.url)}: has {len(samples)} samples, but the index that named it records {shard.num_samples}"
                )
            for members in samples:
                self._refuse_rivals(members, shard)
            labels = self._account(samples, file.fileno(), in_tar)
        if is_plain_local(shard):
            kept = keep_offsets(path, samples, self.rules, beside)
            _account_offsets(kept, findings)
            if kept.new:
                self.record_new(kept.new)
        for found, named in (
            (in_tar.left_out, findings.left_out),
            (in_tar.passed_over, findings.passed_over),
        ):
            named += [replace(finding, name=f"{shard.name}/{finding.name}") for finding in found]
        findings.used = in_tar.used
        measured = _measured(shard, path, self.cache)
        self.cache.forget(shard)
        return ScannedShard(replace(measured, num_samples=len(samples)), frozenset(labels), findings)

    def _refuse_rivals(self, members: Sequence[Member], shard: Shard) -> None:
        """Raise UserError where a group of members is several samples, or its image or label cannot be chosen."""
        rivals = self.rules.rivals(members)
        if not rivals:
            return
        names = ", ".join(one_line(member.name) for member in rivals[:MAX_NAMES])
        more = ", …" if len(rivals) > MAX_NAMES else ""
        what = "image" if self.rules.is_image(rivals[0].extension) else "label"
        choice = f", and --{what}-ext {rivals[0].extension} reads that {what} alone" if not more else ""
        raise UserError(
            f"{shown(shard.url)}: {len(rivals)} members share the key {one_line(members[0].key)}; a sample has one "
            f"{what}, and these would be one sample: {names}{more}. A key ends at the first dot of a name, as in "
            f"webdataset; with `--key full` it ends at the last one{choice}"
        )

    def _account(self, samples: Sequence[Sequence[Member]], fd: int, findings: Findings) -> set[int]:
        """Count the samples that can be used and record why others cannot. Returns the labels that were found."""
        labels: set[int] = set()
        several: dict[str, tuple[int, str]] = {}
        incomplete: list[Sequence[Member]] = []
        for members in samples:
            image, label = self.rules.image(members), self.rules.label(members)
            if image is None or label is None:
                incomplete.append(members)
                continue
            if problem := _problem_of_size(image, label):
                findings.leave_out(members[0].key, problem)
                continue
            if len(members) > 2 and (others := self._other_images(members, image)):
                kind = f"several images in a sample: .{image.extension} is read, not {', '.join(others)}"
                count, first = several.get(kind, (0, members[0].key))
                several[kind] = count + 1, first
            try:
                labels.add(self._class_of(label, fd))
                findings.used += 1
            except LabelError as error:
                findings.leave_out(members[0].key, error.kind, error.detail)
        for kind, (count, first) in several.items():
            findings.pass_over(first, kind, count=count)
        if incomplete:
            self._account_incomplete(incomplete, samples, findings)
        return labels

    def _other_images(self, members: Sequence[Member], image: Member) -> list[str]:
        """Return the extensions of the images that are not read, those that a person does not want among them."""
        return sorted(
            f".{member.extension}"
            for member in members
            if member is not image and member.last_extension in self._image_extensions
        )

    def _class_of(self, label: Member, fd: int) -> int:
        content = os.pread(fd, label.size, label.offset)
        number = parse_label(content, is_json=label.is_json, ids=self.class_ids)
        if number < 0:
            raise LabelError("the label is negative", f"it is {number}")
        return number

    def _account_incomplete(
        self,
        incomplete: Sequence[Sequence[Member]],
        samples: Sequence[Sequence[Member]],
        findings: Findings,
    ) -> None:
        """Record samples without image or label; members of the same key may lie elsewhere in the tar."""
        with_image = {members[0].key for members in samples if self.rules.image(members)}
        image_alone = {_name(members) for members in incomplete if self.rules.image(members)}
        label_alone = {members[0].key for members in incomplete if self.rules.label(members)}
        label_names = {_name(members) for members in incomplete if self.rules.label(members)}
        expected = " or ".join(f".{extension}" for extension in self.rules.label_extensions)
        for members in incomplete:
            key = members[0].key
            present = ", ".join(f".{member.extension}" for member in members)
            if self.rules.image(members) is None:
                if key in with_image or (self.rules.label(members) and _name(members) in image_alone):
                    findings.pass_over(key, "members that lie apart from their image")
                else:
                    findings.leave_out(key, "has no image", present)
            elif key in label_alone:
                findings.leave_out(key, APART)
            elif _name(members) in label_names:
                findings.leave_out(key, OTHER_FOLDER)
            else:
                findings.leave_out(key, f"has no label ({expected}; --label-ext reads others)", present)


def _name(members: Sequence[Member]) -> str:
    """Return the key of a sample without its folder."""
    return members[0].key.rpartition("/")[2]


def _problem_of_size(image: Member, label: Member) -> str | None:
    if image.size == 0:
        return "an empty image"
    if image.size > MAX_IMAGE_BYTES:
        return f"an image of more than {MAX_IMAGE_BYTES // 2**20} MiB"
    return f"a label of more than {MAX_LABEL_BYTES // 2**20} MiB" if label.size > MAX_LABEL_BYTES else None


def _account_offsets(kept: Kept, findings: Findings) -> None:
    for path in kept.not_ours:
        findings.pass_over(path.name, "an .idx of another tar or program, which stays as it is")


def _measured(shard: Shard, path: Path, cache: ShardCache) -> Shard:
    """Return the shard with bytes and checksum of the file as it is stored, compressed or not. Raises TarError."""
    if is_local(shard.url):
        path = local_path(shard.url)
    elif fetched := cache.fetched_checksum(shard):  # the cache keeps no compressed bytes to measure
        return Shard(shard.url, *fetched, shard.num_samples)
    problem = difference(path, shard)
    if problem:
        raise TarError(f"{shown(shard.url)}: {problem}")
    return Shard(shard.url, path.stat().st_size, checksum(path), shard.num_samples)
