"""Shards that have an index, as a source: to be written anew, in another order, shrunk or seekable."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from resnet_dist.data.findings import Findings, one_line
from resnet_dist.data.prepare.items import SHARED, Item, Source, plain_name
from resnet_dist.data.shards.index import Index, Shard, check_shards, read_index
from resnet_dist.data.shards.labels import check_label, class_difference, class_ids, parse_label
from resnet_dist.data.shards.listing import account_beside
from resnet_dist.data.shards.members import MAX_IMAGE_BYTES, MAX_LABEL_BYTES, Member
from resnet_dist.data.shards.offsets import load_members
from resnet_dist.data.shards.tar import TarError
from resnet_dist.data.storage.stored_file import is_plain_local
from resnet_dist.data.storage.urls import local_path, shown
from resnet_dist.errors import UserError

OTHER_MEMBER = "a member beside image and label"


def open_indexed(name: str, locations: Mapping[str, str], beside: Findings) -> Source:
    """Open the indexes of a source. beside: what lies beside them.

    Raises UserError where a shard is not a plain tar here, or classes differ.
    """
    indexes = {split: read_index(location) for split, location in locations.items()}
    classes, *others = (index.classes for index in indexes.values())
    for other in others:
        difference = class_difference(classes, other)
        if difference is not None:
            raise UserError(f"{one_line(name)}: the classes of train and eval are not the same: {difference}")
    splits: dict[str, Sequence[Item]] = {}
    findings = {SHARED: beside}
    for split, index in indexes.items():
        findings[split] = Findings()
        if os.path.isdir(locations[split]):
            names = {shard.name for shard in index.shards}
            account_beside(Path(locations[split]), names, findings[split])
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
