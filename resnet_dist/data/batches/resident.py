"""A data set that fits: every image decoded once and kept as bytes, in memory or on the device.

Shapes: N samples of the index, B of a batch, S image size, C channels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.config import Data
from resnet_dist.data.images.augment import augmented
from resnet_dist.data.images.draws import Randomness
from resnet_dist.data.images.pixels import to_device
from resnet_dist.errors import UserError
from resnet_dist.order.samples import PADDING
from resnet_dist.system.memory import available_memory, ranks_of_this_node

SHARE_OF_FREE = 0.8  # of the memory that is free now: the rest of the process wants some too


class Buffers:
    """Memory for images, given out again once nobody holds it: fresh memory costs a page fault every 4 KiB."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._arrays: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of any content. Every tensor and array that shares its memory keeps it from being used again."""
        for array in self._arrays:
            if array.shape == shape and sys.getrefcount(array) == _REFERENCES_OF_OURS:
                return torch.from_numpy(array)
        array = np.empty(shape, np.uint8)
        self._arrays = [*self._arrays, array][-self._most :]
        return torch.from_numpy(array)


def _references_of_ours() -> int:
    """What `take` counts of an array that nobody else holds: Python versions count differently."""
    for array in [np.empty(1, np.uint8)]:
        return sys.getrefcount(array)
    raise AssertionError


_REFERENCES_OF_OURS = _references_of_ours()


@dataclass(frozen=True)
class Samples:
    """Images of one size, and what belongs to them."""

    images_NSSC: Tensor  # uint8
    labels_N: Tensor  # int64
    weights_N: Tensor  # float32: 1, or 0 for a bad sample and for padding
    bad: dict[int, str] = field(default_factory=dict)  # row → what is wrong; threads fill it

    @classmethod
    def around(cls, images_NSSC: Tensor) -> Samples:
        """Images that are still to be written, all of them, with labels and weights of 0."""
        count, device = len(images_NSSC), images_NSSC.device
        labels_N = torch.zeros(count, dtype=torch.int64, device=device)
        return cls(images_NSSC, labels_N, torch.zeros(count, device=device))

    def put(self, first: int, others: Samples) -> None:
        """Copy `others` into the rows from `first` on, from whatever device they are on."""
        rows = slice(first, first + len(others.labels_N))
        self.images_NSSC[rows].copy_(others.images_NSSC)
        self.labels_N[rows].copy_(others.labels_N)
        self.weights_N[rows].copy_(others.weights_N)
        self.bad.update({first + row: text for row, text in others.bad.items()})

    def to(self, device: torch.device) -> Samples:
        """Copied to `device`; to a GPU from pinned memory, queued behind what it computes: the host does not wait."""
        tensors = [self.images_NSSC, self.labels_N, self.weights_N]
        if device.type == "cuda":
            tensors = [tensor if tensor.is_cuda else tensor.pin_memory() for tensor in tensors]
        images, labels, weights = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Samples(images, labels, weights, self.bad)

    def select(self, ids_B: NDArray[np.int64], data: Data, random: Randomness | None, size: int) -> Samples:
        """The samples of a batch, augmented to `size` unless `random` is None; zeros where there is PADDING."""
        rows_B = np.maximum(ids_B, 0)
        here_B = to_device(rows_B, self.labels_N.device)
        samples = Samples(
            augmented(self.images_NSSC, rows_B, data, random, size),
            self.labels_N.index_select(0, here_B),
            self.weights_N.index_select(0, here_B),
            {row: self.bad[i] for row, i in enumerate(ids_B.tolist()) if i in self.bad} if self.bad else {},
        )
        padding = np.flatnonzero(ids_B == PADDING).tolist()
        if padding:
            samples.labels_N[padding] = 0
            samples.weights_N[padding] = 0
        samples.blacken([*padding, *samples.bad])
        return samples

    def blacken(self, rows: list[int]) -> None:
        """No augmentation leaves a trace on what is not there."""
        if rows:
            self.images_NSSC[rows] = 0


def check_fits(num_samples: int, size: int, data: Data, device: torch.device) -> None:
    """Raise UserError where `data.cache` would need more memory than this rank's node or device has free.

    Every rank of a node keeps a set of its own.
    """
    needed = num_samples * size**2 * data.channels
    here = device.type != "cuda"
    ranks = ranks_of_this_node() if here else 1
    free = available_memory() if here else torch.cuda.mem_get_info(device)[0]
    if ranks * needed > SHARE_OF_FREE * free:
        times = f" in each of the {ranks} ranks of this node" if ranks > 1 else ""
        raise UserError(
            f"data.cache={data.cache!r} needs {needed / 2**30:.1f} GiB{times} for {num_samples:,} images of "
            f"{size} x {size} pixels, and {free / 2**30:.1f} GiB are free; use cache='none'"
        )
