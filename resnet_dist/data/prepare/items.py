"""The samples of a source, not read yet, and their division where the source has no splits of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from resnet_dist.data.findings import Findings
from resnet_dist.order.philox import Purpose, permutation

HELD_OUT = 0.2  # share of the images that becomes the eval split where a source has no splits
# Findings that belong to no split alone, such as a file beside the folders of the splits.
SHARED = ""


@dataclass(frozen=True)
class Item:
    """An image that is not read yet."""

    label: int
    extension: str  # without a dot; the format of the encoded bytes, as its name has it
    read: Callable[[], bytes]
    name: str = ""  # for messages: the file relative to its split's folder, or the number in the set
    num_bytes: int = 0  # the size of the file; 0: unknown until it is read


@dataclass(frozen=True)
class Source:
    """A data set that can be prepared."""

    name: str  # part of the file names of its shards
    classes: tuple[str, ...]  # by label
    splits: Mapping[str, Sequence[Item]]  # "train" and "eval"
    findings: Mapping[str, Findings] = field(default_factory=dict)  # by split, or SHARED
    folders: Mapping[str, str] = field(default_factory=dict)  # by split: `Training/`, relative to the source


def plain_name(name: str) -> str:
    """Return the name of a folder or file as part of a shard's name, without characters that break a URL or an `.idx`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "images"


def hold_out(items: Sequence[Item], seed: int) -> dict[str, Sequence[Item]]:
    """Split the items at random: a share of HELD_OUT, rounded up, is `eval`, the rest `train`."""
    shuffled = permutation(len(items), Purpose.SPLIT, seed=seed)
    return _divide(items, set(shuffled[: -(-len(items) // round(1 / HELD_OUT))].tolist()))


def hold_out_of_each_class(items: Sequence[Item], seed: int) -> dict[str, Sequence[Item]]:
    """Split the items at random: a share of HELD_OUT of each class, rounded, is `eval`, the rest `train`.

    A class of two or more is in both. The only item of a class is in `train`.
    """
    by_label: dict[int, list[int]] = {}
    for number in permutation(len(items), Purpose.SPLIT, seed=seed).tolist():
        by_label.setdefault(items[number].label, []).append(number)
    held_out: set[int] = set()
    for numbers in by_label.values():
        if len(numbers) > 1:
            held_out.update(numbers[: max(1, round(len(numbers) * HELD_OUT))])
    return _divide(items, held_out)


def _divide(items: Sequence[Item], held_out: set[int]) -> dict[str, Sequence[Item]]:
    return {
        "train": [item for number, item in enumerate(items) if number not in held_out],
        "eval": [item for number, item in enumerate(items) if number in held_out],
    }
