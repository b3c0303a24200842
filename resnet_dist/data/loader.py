"""The loader: order + shards + decode → the batch of a step, decoded by threads, ahead of the loop.

Decoders release the GIL, so threads of this process beat worker processes: nothing is pickled or copied.
Shapes: B samples that this rank has of a step, N samples of the index, S image size, C channels.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.config import Data, UserError
from resnet_dist.data.augment import Draws, Randomness, augment_, mirrors, randomness, to_size
from resnet_dist.data.cache import Buffers, Samples, check_fits, image_bytes
from resnet_dist.data.decode import open_image
from resnet_dist.data.index import Index
from resnet_dist.data.order import PADDING, Order
from resnet_dist.data.shards import BadSample, ShardReader, check_label
from resnet_dist.data.storage import Limits, lies_here
from resnet_dist.world import World

# Handing a task to a thread costs what decoding a tiny image does, and a batch is ready when its last task is.
PIXELS_PER_TASK, SAMPLES_PER_TASK = 16 * 224 * 224, 128


@dataclass(frozen=True)
class Batch:
    """What one rank has of one step."""

    images_BSSC: Tensor  # uint8
    labels_B: Tensor  # int64
    weights_B: Tensor  # float32: 1, or 0 for a bad sample and for padding
    ids_B: NDArray[np.int64]  # sample ids, PADDING where a last evaluation step has none
    bad: tuple[str, ...]  # keys of samples that could not be decoded, with the reason
    wait_seconds: float  # how long the loop stood still for it


class Loader:
    """Batches of one rank by step. Close it, or use it as a context manager, to end its threads.

    Raises UserError where `data.cache` asks for more memory than there is.
    """

    def __init__(self, index: Index, order: Order, data: Data, world: World, *, seed: int) -> None:
        self.index, self.order, self.data = index, order, data
        self._seed, self._device = seed, world.device
        self._reader = ShardReader(index, Limits.of(data))
        self._lanes = order.lanes_of(world.rank, world.world_size)
        self._some_are_fetched = not all(lies_here(shard) for shard in index.shards)
        self._wanted: set[int] = set()
        self._buffers = Buffers(self._batches_ahead + 3)  # decoded, in use, and let go of a little later
        self._ahead: deque[tuple[int, _Pending]] = deque()
        workers = data.loader_workers or torch.get_num_threads()
        self._pool = ThreadPoolExecutor(workers, "decode")
        self._cached: Samples | None = None
        if data.cache != "none":
            try:
                self._cached = self._decode_all()
            except BaseException:
                self.close()
                raise

    def batch_at(self, step: int) -> Batch:
        """The batch of `step`, counted from the start of training. In sequence it is decoded ahead of use.

        Raises StorageError where a shard cannot be had, IndexMismatch where it is not the one that was
        indexed. A bad sample comes as zeros of weight 0.
        """
        start = time.perf_counter()
        if not self._ahead or self._ahead[0][0] != step:
            self._drop_ahead()
        last = self._ahead[-1][0] if self._ahead else step - 1
        for later in range(last + 1, step + 1 + self._batches_ahead):
            self._ahead.append((later, self._submit(later)))
        pending = self._ahead.popleft()[1]
        for task in pending.tasks:
            task.result()
        samples = pending.samples().to(self._device)
        bad = tuple(samples.bad[row] for row in sorted(samples.bad))
        waited = time.perf_counter() - start
        return Batch(samples.images_NSSC, samples.labels_N, samples.weights_N, pending.ids_B, bad, waited)

    def close(self) -> None:
        self._drop_ahead()
        self._reader.close()  # first: decoders may be waiting for a shard that does not come
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _batches_ahead(self) -> int:
        """Batches decoded beyond the one that is used: within `prefetch_batches` and `prefetch_bytes`."""
        batch_bytes = self.order.per_lane * len(self._lanes) * image_bytes(self.data)
        return max(1, min(self.data.prefetch_batches, self.data.prefetch_bytes // batch_bytes - 1))

    def _drop_ahead(self) -> None:
        for _, pending in self._ahead:
            for task in pending.tasks:
                task.cancel()
        self._ahead.clear()

    def _submit(self, step: int) -> _Pending:
        ids = self.order.ids_at(step, self._lanes)
        random = None
        if self.order.training:
            epoch = step // self.order.steps_per_epoch
            random = randomness(ids, self.data, seed=self._seed, epoch=epoch)
        if self._cached is None:
            if self._some_are_fetched:
                self._fetch_ahead(step)
            samples = Samples.empty(len(ids), self.data, self._buffers)
            tasks = [
                self._pool.submit(self._fill, samples, ids, rows, random)
                for rows in _parts(len(ids), self.data)
            ]
            return _Pending(ids, tasks, lambda: samples)
        if self.data.cache == "device":  # which works in sequence anyway
            chosen = self._cached.select(ids, self.data, random)
            return _Pending(ids, [], lambda: chosen)
        task = self._pool.submit(self._cached.select, ids, self.data, random)
        return _Pending(ids, [task], task.result)

    def _fetch_ahead(self, step: int) -> None:
        """Shards are asked for a window and half a shard before the first step that reads them."""
        samples = self.order.window + self.order.num_samples // len(self.index.shards) // 2
        wanted = self.order.shards_ahead(step, self._lanes, 1 + samples // self.order.per_lane)
        self._reader.want(number for number in wanted if number not in self._wanted)
        self._wanted = set(wanted)

    def _fill(self, batch: Samples, ids: NDArray[np.int64], rows: slice, random: Randomness | None) -> None:
        """Make some rows of a batch, in place."""
        part = Samples(batch.images_NSSC[rows], batch.labels_N[rows], batch.weights_N[rows])
        own = None if random is None else random.rows(rows)
        self._decode(part, ids[rows].tolist(), own)
        if own is not None:
            images = augment_(part.images_NSSC, np.arange(len(part.labels_N)), self.data, own)
            if images is not part.images_NSSC:
                part.images_NSSC.copy_(images)
            part.blacken(list(part.bad))
        batch.bad.update({rows.start + row: text for row, text in part.bad.items()})

    def _decode(self, part: Samples, ids: list[int], random: Randomness | None) -> None:
        """Read and decode samples to the recipe's size; a bad one is left black, with weight 0."""
        images, labels, weights = part.images_NSSC.numpy(), part.labels_N.numpy(), part.weights_N.numpy()
        crops: Iterable[Draws | None] = itertools.repeat(None)
        mirror: Iterable[bool] = itertools.repeat(False)
        if random is not None:
            mirror = mirrors(self.data, random)
            crops = random.crop_NK if random.crop_NK.size else crops
        for row, (sample_id, crop, flip) in enumerate(zip(ids, crops, mirror, strict=False)):
            if sample_id == PADDING:
                images[row] = 0
                continue
            try:
                encoded, label = self._reader.read(sample_id)
                image = open_image(encoded, self.data.channels)
                images[row] = to_size(image, self.data, crop, mirror=flip)
                labels[row] = check_label(label, len(self.index.classes))
                weights[row] = 1.0
            except UserError:
                raise  # not the sample's fault
            except (BadSample, ValueError) as problem:
                images[row] = 0
                part.bad[row] = f"{self._reader.key(sample_id)}: {problem}"

    def _decode_all(self) -> Samples:
        """Every image of the index at the recipe's size, before its augmentation."""
        device = self._device if self.data.cache == "device" else torch.device("cpu")
        count = self.index.num_samples
        check_fits(count, self.data, device)
        samples, ids = Samples.empty(count, self.data, Buffers(1)), np.arange(count)
        tasks = [self._pool.submit(self._fill, samples, ids, rows, None) for rows in _parts(count, self.data)]
        for task in tasks:
            task.result()
        return samples.to(device)


@dataclass(frozen=True)
class _Pending:
    """A batch that threads are filling."""

    ids_B: NDArray[np.int64]
    tasks: Sequence[Future[Any]]
    samples: Callable[[], Samples]  # once the tasks are done


def _parts(count: int, data: Data) -> list[slice]:
    """Rows of a batch, cut into tasks for threads."""
    size = min(SAMPLES_PER_TASK, max(1, PIXELS_PER_TASK // data.image_size**2))
    return [slice(low, min(low + size, count)) for low in range(0, count, size)]
