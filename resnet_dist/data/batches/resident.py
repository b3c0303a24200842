"""Decoded images in memory: a whole data set that is kept, or the batches whose memory is reused.

Shapes: N samples (of the index, or of a batch), B samples of a batch, S image size, C channels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
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

CHUNK_BYTES = 256 * 2**20  # images that are decoded before they are copied to their place
MAX_SHARE_OF_FREE = 0.8  # a share of the free memory: the rest of the process needs some too


class Buffers:
    """Memory for images that is reused once nobody holds it: fresh memory costs a page fault every 4 KiB.

    pinned: memory from which a GPU copies by itself, which takes long to get.
    """

    def __init__(self, max_arrays: int, *, pinned: bool = False) -> None:
        self._max_arrays, self._pinned = max_arrays, pinned
        self._arrays: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Return a uint8 tensor with undefined content.

        Its memory is not reused as long as any tensor or array shares it.
        """
        for array in self._arrays:
            if array.shape == shape and sys.getrefcount(array) == _UNSHARED_REFERENCES:
                return torch.from_numpy(array)
        array = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned).numpy()
        self._arrays = [*self._arrays, array][-self._max_arrays :]
        return torch.from_numpy(array)


def _count_unshared_references() -> int:
    """Count the references that `take` sees of an array that nobody else holds: it depends on Python's version."""
    for array in [np.empty(1, np.uint8)]:  # a loop over a list, exactly as in `take`
        return sys.getrefcount(array)
    raise AssertionError


_UNSHARED_REFERENCES = _count_unshared_references()


@dataclass(frozen=True)
class Samples:
    """Images of one size, with their labels and weights."""

    images_NSSC: Tensor  # uint8
    labels_N: Tensor  # int64
    weights_N: Tensor  # float32: 1, or 0 for a bad sample and for padding
    bad: dict[int, str] = field(default_factory=dict)  # row → key and reason; threads fill it

    @classmethod
    def around(cls, images_NSSC: Tensor) -> Samples:
        """Return samples that hold `images_NSSC`, still to be written, with labels and weights of 0."""
        count, device = len(images_NSSC), images_NSSC.device
        labels_N = torch.zeros(count, dtype=torch.int64, device=device)
        return cls(images_NSSC, labels_N, torch.zeros(count, device=device))

    def put(self, first: int, others: Samples) -> None:
        """Copy `others`, from any device, into the rows from `first` on."""
        rows = slice(first, first + len(others.labels_N))
        self.images_NSSC[rows].copy_(others.images_NSSC)
        self.labels_N[rows].copy_(others.labels_N)
        self.weights_N[rows].copy_(others.weights_N)
        self.bad.update({first + row: text for row, text in others.bad.items()})

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.images_NSSC, self.labels_N, self.weights_N

    def pinned(self) -> Samples:
        """Return the samples in pinned memory; those that lie there, or on a device, as they are."""
        images, labels, weights = (
            tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory() for tensor in self.tensors
        )
        return Samples(images, labels, weights, self.bad)

    def to(self, device: torch.device) -> Samples:
        """Return the samples on `device`; from pinned memory, the host does not wait for the copy."""
        images, labels, weights = (tensor.to(device, non_blocking=True) for tensor in self.tensors)
        return Samples(images, labels, weights, self.bad)

    def select(self, ids_B: NDArray[np.int64], data: Data, random: Randomness | None, size: int) -> Samples:
        """Return the samples of a batch, augmented to `size` unless `random` is None; zeros where an id is PADDING.

        Row i of the set must be sample i of the index.
        """
        rows_B = np.maximum(ids_B, 0)  # PADDING is negative; its rows are cleared below.
        indices_B = to_device(rows_B, self.labels_N.device)
        samples = Samples(
            augmented(self.images_NSSC, rows_B, data, random, size),
            self.labels_N.index_select(0, indices_B),
            self.weights_N.index_select(0, indices_B),
            {row: self.bad[i] for row, i in enumerate(ids_B.tolist()) if i in self.bad} if self.bad else {},
        )
        padding = np.flatnonzero(ids_B == PADDING).tolist()
        if padding:
            samples.labels_N[padding] = 0
            samples.weights_N[padding] = 0
        samples.blacken([*padding, *samples.bad])
        return samples

    def blacken(self, rows: list[int]) -> None:
        """Set whole images to zero, and with them all traces of augmentation."""
        if rows:
            self.images_NSSC[rows] = 0


def keep_all(
    count: int,
    size: int,
    data: Data,
    device: torch.device,
    buffers: Buffers,
    fill: Callable[[Samples, NDArray[np.int64]], None],
) -> Samples:
    """Return all `count` samples of an index on a device, at one size. fill: decodes the samples of these ids.

    Raises UserError where they do not fit.
    """
    check_fits(count, size, data, device)
    kept = Samples.around(torch.empty((count, size, size, data.channels), dtype=torch.uint8, device=device))
    per_chunk = min(count, max(1, CHUNK_BYTES // (size * size * data.channels)))
    images = buffers.take((per_chunk, size, size, data.channels))
    for first in range(0, count, per_chunk):
        ids = np.arange(first, min(first + per_chunk, count))
        chunk = Samples.around(images[: len(ids)])
        fill(chunk, ids)
        kept.put(first, chunk)
    return kept


def check_fits(num_samples: int, size: int, data: Data, device: torch.device) -> None:
    """Raise UserError where `data.cache` would need more memory than this rank's node or device has free.

    Every rank of a node keeps its own copy of the set. size: height and width in pixels.
    """
    needed = num_samples * size**2 * data.channels
    on_host = device.type != "cuda"
    ranks = ranks_of_this_node() if on_host else 1
    free = available_memory() if on_host else torch.cuda.mem_get_info(device)[0]
    if ranks * needed > MAX_SHARE_OF_FREE * free:
        times = f" in each of the {ranks} ranks of this node" if ranks > 1 else ""
        raise UserError(
            f"data.cache={data.cache!r} needs {needed / 2**30:.1f} GiB{times} for {num_samples:,} images of "
            f"{size} x {size} pixels, and {free / 2**30:.1f} GiB are free; use cache='none'"
        )
