"""The loader: order + shards + decode → the batch of a step, decoded by threads, ahead of the loop.

Decoders release the GIL, so threads of this process beat worker processes: nothing is pickled or copied.
Shapes: B samples that this rank has of a step: M distinct ones, R copies of each; S image size, C channels.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.config import Data
from resnet_dist.data.batches.fill import Decoder
from resnet_dist.data.batches.resident import Buffers, Samples, check_fits
from resnet_dist.data.images.augment import recolors
from resnet_dist.data.images.draws import Randomness, randomness
from resnet_dist.data.shards.index import Index
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.data.storage.shard_cache import CacheLimits, is_plain_local
from resnet_dist.order.samples import Order
from resnet_dist.order.sizes import Sizes
from resnet_dist.world import World

# Handing a task to a thread costs what decoding a tiny image does, and a batch is ready when its last task is.
PIXELS_PER_TASK, SAMPLES_PER_TASK = 16 * 224 * 224, 128
SMALL_SAMPLE_BYTES = 8 * 2**10  # in its shard, with the tar's headers, on average
SMALL_SIZE = 64  # pixels: to enlarge an image to more takes longer than what needs Python's lock
CHUNK_BYTES = 256 * 2**20  # of a set that is kept: what is decoded here before it goes to where it is kept


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

    sizes: the image size of every step; None: `data.image_size`, or in evaluation that of evaluation.
    total_steps: the length of training, beyond which nothing is decoded ahead.

    Raises UserError where `data.cache` asks for more memory than there is.
    """

    def __init__(
        self,
        index: Index,
        order: Order,
        data: Data,
        world: World,
        *,
        seed: int,
        sizes: Sizes | None = None,
        total_steps: int | None = None,
    ) -> None:
        self.index, self.order, self.data = index, order, data
        self._seed, self._device = seed, world.device
        # What decoding brings an image to; only a random crop is brought to the step's size at once.
        self._whole_size = data.image_size if order.training else data.evaluation_size
        self._sizes = sizes or Sizes.constant(self._whole_size)
        self._end = total_steps if order.training else order.steps_per_epoch
        self._reader = ShardReader(index, CacheLimits.of(data))
        self._decoder = Decoder(self._reader, len(index.classes), data)
        self._lanes = order.lanes_of(world.rank, world.world_size)
        self._rows_MR = order.rows_of_samples(len(self._lanes))
        self._some_are_fetched = not all(is_plain_local(shard) for shard in index.shards)
        self._wanted: set[int] = set()
        self._buffers = Buffers(self._batches_ahead + 3)  # decoded, in use, and let go of a little later
        self._ahead: deque[tuple[int, _Pending]] = deque()
        self.threads = data.loader_workers or _threads_for(index, data, self._sizes.largest)
        self._pool = _start_threads(self.threads)
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
        for later in range(last + 1, step + 1 + min(self._batches_ahead, self._steps_after(step))):
            self._ahead.append((later, self._submit(later)))
        pending = self._ahead.popleft()[1]
        for task in pending.tasks:
            task.result()
        samples = pending.samples().to(self._device)
        bad = tuple(samples.bad[row] for row in sorted(samples.bad))
        waited = time.perf_counter() - start
        return Batch(samples.images_NSSC, samples.labels_N, samples.weights_N, pending.ids_B, bad, waited)

    def drain(self) -> int:
        """Wait for what is decoded ahead, and drop it: how many samples that was. For benchmarks, between rounds."""
        samples = 0
        for _, pending in self._ahead:
            for task in pending.tasks:
                task.result()
            samples += len(pending.ids_B)
        self._ahead.clear()
        return samples

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
        images = self.order.per_lane * len(self._lanes)
        batch_bytes = images * self._sizes.largest**2 * self.data.channels
        return max(1, min(self.data.prefetch_batches, self.data.prefetch_bytes // batch_bytes - 1))

    def _steps_after(self, step: int) -> int:
        """Steps that follow `step`, to the end of training or of the evaluation."""
        return sys.maxsize if self._end is None else max(0, self._end - 1 - step)

    def _drop_ahead(self) -> None:
        for _, pending in self._ahead:
            for task in pending.tasks:
                task.cancel()
        self._ahead.clear()

    def _submit(self, step: int) -> _Pending:
        ids = self.order.ids_at(step, self._lanes)
        random = self._randomness(ids, step) if self.order.training else None
        size = self._sizes.at(step)
        if self._cached is None:
            if self._some_are_fetched:
                self._fetch_ahead(step)
            samples = Samples.around(self._buffers.take((len(ids), size, size, self.data.channels)))
            cropped = self.order.training and self.data.crop == "random-resized-crop"
            tasks = self._submit_decoding(
                samples, ids, self._rows_MR, random, size if cropped else self._whole_size
            )
            return _Pending(ids, tasks, lambda: samples)
        if self.data.cache == "device":  # which works in sequence anyway
            chosen = self._cached.select(ids, self.data, random, size)
            return _Pending(ids, [], lambda: chosen)
        task = self._pool.submit(self._cached.select, ids, self.data, random, size)
        return _Pending(ids, [task], task.result)

    def _randomness(self, ids: NDArray[np.int64], step: int) -> Randomness:
        copies = np.empty(len(ids), np.int64)
        copies[self._rows_MR] = np.arange(self.order.repeats)
        epoch = step // self.order.steps_per_epoch
        return randomness(ids, self.data, seed=self._seed, epoch=epoch, copies_N=copies)

    def _fetch_ahead(self, step: int) -> None:
        """Shards are asked for a window and half a shard before the first step that reads them."""
        samples = self.order.window + self.order.num_samples // len(self.index.shards) // 2
        steps = min(samples // self.order.distinct_per_lane, self._steps_after(step))
        wanted = self.order.shards_ahead(step, self._lanes, 1 + steps)
        self._reader.want(number for number in wanted if number not in self._wanted)
        self._wanted = set(wanted)

    def _submit_decoding(
        self,
        samples: Samples,
        ids: NDArray[np.int64],
        rows_MR: NDArray[np.int64],
        random: Randomness | None,
        size: int,
    ) -> list[Future[None]]:
        return [
            self._pool.submit(self._decoder.fill, samples, ids, part_MR, random, size)
            for part_MR in _parts(rows_MR, size)
        ]

    def _decode_all(self) -> Samples:
        """Every image of the index at one size, before its augmentation."""
        device = self._device if self.data.cache == "device" else torch.device("cpu")
        count, size, channels = self.index.num_samples, self._whole_size, self.data.channels
        check_fits(count, size, self.data, device)
        kept = Samples.around(torch.empty((count, size, size, channels), dtype=torch.uint8, device=device))
        per_chunk = min(count, max(1, CHUNK_BYTES // (size * size * channels)))
        images = self._buffers.take((per_chunk, size, size, channels))
        for first in range(0, count, per_chunk):
            ids = np.arange(first, min(first + per_chunk, count))
            chunk = Samples.around(images[: len(ids)])
            for task in self._submit_decoding(chunk, ids, np.arange(len(ids))[:, None], None, size):
                task.result()
            kept.put(first, chunk)
        return kept


@dataclass(frozen=True)
class _Pending:
    """A batch that threads are filling."""

    ids_B: NDArray[np.int64]
    tasks: Sequence[Future[Any]]
    samples: Callable[[], Samples]  # once the tasks are done


def _start_threads(count: int) -> ThreadPoolExecutor:
    """Threads in which torch starts no others: those spin while they wait for more, and take CPUs from decoding.

    torch keeps their number for each thread; one that is asked for the first time takes the newest of any thread.
    """

    def work_alone() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "decode", initializer=work_alone)
    all_there = threading.Barrier(count)
    try:
        for waiting in [pool.submit(all_there.wait) for _ in range(count)]:
            waiting.result()
    finally:
        all_there.abort()
        torch.set_num_threads(before)
    return pool


def _threads_for(index: Index, data: Data, size: int) -> int:
    """One per CPU of this rank; but one for decoding small images, of which Python's lock lets only one be worked at.

    Two threads that take turns are slower than one, by a quarter on CIFAR-10.
    """
    said = all(shard.num_bytes for shard in index.shards if shard.num_samples)
    small = said and sum(shard.num_bytes for shard in index.shards) < SMALL_SAMPLE_BYTES * index.num_samples
    if small and size <= SMALL_SIZE and data.cache == "none" and not recolors(data):
        return 1
    return torch.get_num_threads()


def _parts(rows_MR: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Samples of a batch, cut into tasks for threads."""
    images = min(SAMPLES_PER_TASK, max(1, PIXELS_PER_TASK // size**2))
    samples = max(1, images // rows_MR.shape[1])
    return [rows_MR[low : low + samples] for low in range(0, len(rows_MR), samples)]
