"""Shards that have an index, as a source: to be written anew, in another order, shrunk or seekable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from resnet_dist.data.findings import Findings, one_line
from resnet_dist.data.prepare.items import Item, Source, plain_name
from resnet_dist.data.shards.index import (
    INDEX_NAME,
    SECOND_INDEX_NAME,
    Index,
    Shard,
    check_shards,
    read_index,
)
from resnet_dist.data.shards.labels import check_label, class_difference, class_ids, parse_label
from resnet_dist.data.shards.members import MAX_IMAGE_BYTES, MAX_LABEL_BYTES, Member
from resnet_dist.data.shards.offsets import load_members
from resnet_dist.data.shards.tar import TarError
from resnet_dist.data.storage.shard_cache import is_plain_local
from resnet_dist.data.storage.urls import local_path, shown
from resnet_dist.errors import UserError

SPLITS = ("train", "eval")
OTHER_MEMBER = "a member beside image and label"


def indexes_of(name: str, split: str | None) -> dict[str, str]:
    """Return the indexes that a source has, by split: it is one, a folder with one, or one with train/ and eval/.

    split: the only one that is wanted. Empty where the source is something else. Raises UserError where an index does
    not name its split, and `split` does not either.
    """
    if (name.endswith(".json") and _is_index(Path(name))) or _has_index(Path(name)):
        if split is None:
            raise UserError(f"{one_line(name)}: is an index of one split; pass --split train or --split eval")
        return {split: name}
    found = {one: str(Path(name) / one) for one in SPLITS if _has_index(Path(name) / one)}
    return {one: found[one] for one in found if split in (None, one)} or found


def _has_index(folder: Path) -> bool:
    return any(_is_index(folder / file) for file in (INDEX_NAME, SECOND_INDEX_NAME))


def _is_index(path: Path) -> bool:
    """Report whether a file lists shards: a folder of images may hold an index.json of something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "shardlist" in value


def open_indexed(name: str, locations: Mapping[str, str]) -> Source:
    """Open the indexes of a source. Raises UserError where a shard is not a plain tar here, or classes differ."""
    indexes = {split: read_index(location) for split, location in locations.items()}
    classes, *others = (index.classes for index in indexes.values())
    for other in others:
        difference = class_difference(classes, other)
        if difference is not None:
            raise UserError(f"{one_line(name)}: the classes of train and eval are not the same: {difference}")
    splits: dict[str, Sequence[Item]] = {}
    findings: dict[str, Findings] = {}
    for split, index in indexes.items():
        findings[split] = Findings()
        splits[split] = _items(index, findings[split])
    own_name = Path(name).absolute().name.removesuffix(".json")
    return Source(plain_name(own_name), classes, splits, findings)


def _items(index: Index, findings: Findings) -> list[Item]:
    for shard in index.shards:
        if not is_plain_local(shard):
            raise UserError(
                f"{one_line(index.location)}: {shown(shard.url)} is no uncompressed tar on this machine; copy or unpack "
                "the shards, and index them here"
            )
    check_shards(index)
    ids, items = class_ids(index.classes), list[Item]()
    for number, shard in enumerate(index.shards):
        path = local_path(shard.url)
        try:
            with path.open("rb") as file:
                samples, _ = load_members(
                    index.offset_files(number), file.fileno(), str(path), shard.num_samples, index.rules
                )
                for members in samples:
                    item = _item(index, ids, shard, path, file.fileno(), members, findings)
                    if item is not None:
                        items.append(item)
        except (OSError, TarError) as error:
            raise UserError(f"{one_line(str(path))}: cannot be read ({error})") from None
    return items


def _item(
    index: Index,
    ids: Mapping[str, int],
    shard: Shard,
    path: Path,
    fd: int,
    members: Sequence[Member],
    findings: Findings,
) -> Item | None:
    """Return the item of a sample; None, and a finding, where it has no usable image or label."""
    image, label = index.rules.image(members), index.rules.label(members)
    for member in members:
        if member not in (image, label):
            findings.pass_over(f"{shard.name}/{member.name}", OTHER_MEMBER)
    name = f"{shard.name}/{members[0].key}"
    if image is None or label is None:
        findings.leave_out(name, f"a sample without {'an image' if image is None else 'a label'}")
        return None
    if image.size > MAX_IMAGE_BYTES or label.size > MAX_LABEL_BYTES:
        findings.leave_out(name, "a sample that is too large", f"{image.size + label.size:,} bytes")
        return None
    try:
        class_id = parse_label(os.pread(fd, label.size, label.offset), is_json=label.is_json, ids=ids)
        check_label(class_id, len(index.classes))
    except ValueError as error:
        findings.leave_out(name, "a sample without a usable label", str(error))
        return None
    read = partial(_read, path, image.offset, image.size)
    return Item(class_id, image.last_extension, read, f"{shard.name}/{image.name}", image.size)


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
