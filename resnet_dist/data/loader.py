"""The loader: order + shards + decode → the batch of a step, decoded by threads, ahead of the loop.

Decoders release the GIL, so threads of this process beat worker processes: nothing is pickled or copied.
Shapes: B samples that this rank has of a step, H height, W width, C channels.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.config import Data
from resnet_dist.data.augment import augment_words, eval_pixels, train_pixels
from resnet_dist.data.decode import decode_image
from resnet_dist.data.index import Index
from resnet_dist.data.order import PADDING, Order
from resnet_dist.data.philox import Words
from resnet_dist.data.shards import BadSample, ShardReader
from resnet_dist.world import World

SAMPLES_PER_TASK = 16  # enough to outweigh handing a task to a thread, few enough to share a small batch


@dataclass(frozen=True)
class Batch:
    """What one rank has of one step."""

    images_BHWC: Tensor  # uint8
    labels_B: Tensor  # int64
    weights_B: Tensor  # float32: 1, or 0 for a bad sample and for padding
    ids_B: NDArray[np.int64]  # sample ids, PADDING where a last evaluation step has none
    bad: tuple[str, ...]  # keys of samples that could not be decoded, with the reason
    wait_seconds: float  # how long the loop stood still for it


class Loader:
    """Batches of one rank by step. Close it, or use it as a context manager, to end its threads."""

    def __init__(self, index: Index, order: Order, data: Data, world: World, *, seed: int) -> None:
        self._order, self._data, self._seed = order, data, seed
        self._reader = ShardReader(index)
        self._num_classes = len(index.classes)
        self._lanes = order.lanes_of(world.rank, world.world_size)
        self._device = world.device
        self._ahead: deque[tuple[int, _Pending]] = deque()
        workers = data.loader_workers or torch.get_num_threads()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def batch_at(self, step: int) -> Batch:
        """The batch of `step`, counted from the start of training. In sequence it is decoded ahead of use.

        Raises OSError where a shard cannot be read. A bad sample comes as zeros of weight 0.
        """
        start = time.perf_counter()
        if not self._ahead or self._ahead[0][0] != step:
            self._drop_ahead()
        last = self._ahead[-1][0] if self._ahead else step - 1
        for later in range(last + 1, step + 1 + self._data.prefetch_batches):
            self._ahead.append((later, self._submit(later)))
        pending = self._ahead.popleft()[1]
        bad = tuple(text for future in pending.futures for text in future.result())
        # To the device as bytes, a quarter of floats; pinned memory lets the copy run beside the last step.
        tensors = [pending.images_BHWC, pending.labels_B, pending.weights_B]
        if self._device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        images, labels, weights = (tensor.to(self._device, non_blocking=True) for tensor in tensors)
        return Batch(images, labels, weights, pending.ids_B, bad, time.perf_counter() - start)

    def close(self) -> None:
        self._drop_ahead()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop_ahead(self) -> None:
        for _, pending in self._ahead:
            for future in pending.futures:
                future.cancel()
        self._ahead.clear()

    def _submit(self, step: int) -> _Pending:
        ids = self._order.ids_at(step, self._lanes)
        size, channels = self._data.image_size, self._data.channels
        pending = _Pending(
            ids_B=ids,
            images_BHWC=torch.zeros(len(ids), size, size, channels, dtype=torch.uint8),
            labels_B=torch.zeros(len(ids), dtype=torch.int64),
            weights_B=torch.zeros(len(ids)),
            futures=[],
        )
        words = None
        if self._order.training:
            epoch = step // self._order.steps_per_epoch
            words = augment_words(ids, self._data, seed=self._seed, epoch=epoch)
        for low in range(0, len(ids), SAMPLES_PER_TASK):
            rows = range(low, min(low + SAMPLES_PER_TASK, len(ids)))
            pending.futures.append(self._pool.submit(self._fill, pending, rows, words))
        return pending

    def _fill(self, pending: _Pending, rows: Sequence[int], words: Words | None) -> list[str]:
        """Decode some rows of a batch in place; returns what was bad."""
        bad = []
        images, labels, weights = (
            pending.images_BHWC.numpy(),
            pending.labels_B.numpy(),
            pending.weights_B.numpy(),
        )
        for row in rows:
            sample_id = int(pending.ids_B[row])
            if sample_id == PADDING:
                continue
            try:
                images[row], labels[row] = self._load(sample_id, None if words is None else words[row])
                weights[row] = 1.0
            except BadSample as problem:
                images[row] = 0
                bad.append(str(problem))
        return bad

    def _load(self, sample_id: int, words: Words | None) -> tuple[NDArray[np.uint8], int]:
        sample = self._reader.read(sample_id)
        if not 0 <= sample.label < self._num_classes:
            raise BadSample(
                sample.key, f"label {sample.label} is not one of the {self._num_classes} classes of the index"
            )
        try:
            pixels = decode_image(sample.image, self._data.channels)
        except ValueError as error:
            raise BadSample(sample.key, str(error)) from None
        if words is None:
            return eval_pixels(pixels, self._data), sample.label
        return train_pixels(pixels, words, self._data), sample.label


@dataclass(frozen=True)
class _Pending:
    """A batch that threads are filling."""

    ids_B: NDArray[np.int64]
    images_BHWC: Tensor
    labels_B: Tensor
    weights_B: Tensor
    futures: list[Future[list[str]]]
