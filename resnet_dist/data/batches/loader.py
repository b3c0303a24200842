"""The loader: gives a rank its batch of any step, which threads decode ahead of the loop.

The image decoders release the GIL, so threads are faster than worker processes: nothing is pickled or copied.

Shapes: B samples of a step on this rank: M distinct ones, R copies of each; S image size, C channels.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.config import Data
from resnet_dist.data.batches.decode_threads import parts_of, start_threads, threads_for
from resnet_dist.data.batches.device_copies import Begun, Copies, NoCopies, copies_to
from resnet_dist.data.batches.fill import Decoder
from resnet_dist.data.batches.gpu_fill import GpuFill
from resnet_dist.data.batches.resident import Buffers, Samples, keep_all
from resnet_dist.data.images.device.codec import NvCodec
from resnet_dist.data.images.draws import Randomness, randomness
from resnet_dist.data.shards.index import Index
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.data.storage.stored_file import is_plain_local
from resnet_dist.order.samples import Order
from resnet_dist.order.shares import Share
from resnet_dist.order.sizes import Sizes
from resnet_dist.world import World


@dataclass(frozen=True)
class Batch:
    """The samples of one step on one rank."""

    images_BSSC: Tensor  # uint8
    labels_B: Tensor  # int64
    weights_B: Tensor  # float32: 1, or 0 for a bad sample and for padding
    ids_B: NDArray[np.int64]  # sample ids; PADDING fills the last step of an evaluation
    bad: tuple[str, ...]  # keys of samples that could not be decoded, with the reason
    wait_seconds: float  # time that the loop spent waiting for this batch


class Loader:
    """The batches of one rank by step. Close it, or use it as a context manager, to end its threads.

    sizes: the image size of every step. Default: `data.image_size`, or `data.evaluation_size` in evaluation.
    total_steps: the length of training, beyond which nothing is decoded ahead. Default: no limit.

    Raises UserError where `data.cache` needs more memory than is free.
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
        # Decode images to this size; augmentation changes it to the step's. Random crops have the step's at once.
        self._whole_size = data.image_size if order.training else data.evaluation_size
        self._sizes = sizes or Sizes.constant(self._whole_size)
        self._end = total_steps if order.training else order.steps_per_epoch
        self._reader = ShardReader(index, CacheLimits.of(data))
        self._decoder = Decoder(self._reader, len(index.classes), data)
        self._share = Share.of(order, data, world.rank, world.world_size)
        self._some_are_fetched = not all(is_plain_local(shard) for shard in index.shards)
        self._wanted: set[int] = set()
        # Beside the batches ahead: the one to be returned, the one in use, and one that is released a little later.
        # On a GPU also two that are being copied.
        self._to_gpu = world.device.type == "cuda"
        self._buffers = Buffers(self._batches_ahead + (5 if self._to_gpu else 3), pinned=self._to_gpu)
        # Batches of a set that is cached on the GPU are made there.
        self._copies: Copies = NoCopies() if data.cache == "device" else copies_to(world.device)
        self._ahead: deque[tuple[int, _Pending]] = deque()
        self.threads = data.loader_workers or threads_for(index, data, self._sizes.largest, world.cpus)
        self._pool = start_threads(self.threads)
        self._gpu_fill = self._start_gpu() if data.decode == "gpu" else None
        self._cached: Samples | None = None
        if data.cache != "none":
            try:
                self._cached = self._decode_all()
            except BaseException:
                self.close()
                raise

    @property
    def num_decoded_on_cpu(self) -> int:
        """The images so far that `data.decode="gpu"` could not decode on the GPU."""
        return 0 if self._gpu_fill is None else self._gpu_fill.num_on_cpu

    def _start_gpu(self) -> GpuFill:
        """Return what decodes on the GPU; end the threads where it cannot be made."""
        try:
            codec = NvCodec(self._device)
        except BaseException:
            self._pool.shutdown()
            raise
        return GpuFill(self._reader, len(self.index.classes), self.data, codec, self._device)

    def batch_at(self, step: int) -> Batch:
        """Return the batch of `step`, counted from the start of training. Ask in sequence: batches are decoded ahead.

        A bad sample is black, with weight 0. Raises StorageError where a shard cannot be read, IndexMismatch where it
        is not the one that was indexed.
        """
        start = time.perf_counter()
        self._submit_until(step)
        pending = self._ahead.popleft()[1]
        samples = self._copies.end(pending.copied or self._begin_copy(pending))
        if self._ahead and self._ahead[0][1].is_done():
            self._begin_copy(self._ahead[0][1])
        bad = tuple(samples.bad[row] for row in sorted(samples.bad))
        waited = time.perf_counter() - start
        return Batch(samples.images_NSSC, samples.labels_N, samples.weights_N, pending.ids_B, bad, waited)

    def _begin_copy(self, pending: _Pending) -> Begun:
        """Wait for the threads that fill a batch, and begin to copy it to the device, unless it was made there."""
        for task in pending.tasks:
            task.result()
        pending.copied = pending.bring()
        return pending.copied

    def drain(self) -> tuple[int, list[str]]:
        """Wait for the batches decoded ahead, and drop them. For benchmarks.

        Returns their number of samples, and the keys of the bad ones among them, with the reasons.
        """
        num_samples, bad = 0, list[str]()
        for _, pending in self._ahead:
            samples = self._copies.end(pending.copied or self._begin_copy(pending))
            num_samples += len(pending.ids_B)
            bad += samples.bad.values()
        self._ahead.clear()
        return num_samples, bad

    def close(self) -> None:
        """Drop the batches decoded ahead, and end the threads."""
        self._drop_ahead()
        self._reader.close()  # Close it before the pool: its threads may be waiting for a shard that never comes.
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._gpu_fill is not None:
            self._gpu_fill.thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _batches_ahead(self) -> int:
        """The number of batches decoded beyond the one in use, within `prefetch_batches` and `prefetch_bytes`."""
        batch_bytes = len(self._share.copies_B) * self._sizes.largest**2 * self.data.channels
        return max(1, min(self.data.prefetch_batches, self.data.prefetch_bytes // batch_bytes - 1))

    def _steps_after(self, step: int) -> int:
        """Return the number of steps after `step`, to the end of training or evaluation."""
        return sys.maxsize if self._end is None else max(0, self._end - 1 - step)

    def _submit_until(self, step: int) -> None:
        """Submit the batch of `step` and those to decode ahead; drop others, where `step` is not the next one."""
        if not self._ahead or self._ahead[0][0] != step:
            self._drop_ahead()
        last = self._ahead[-1][0] if self._ahead else step - 1
        for later in range(last + 1, step + 1 + min(self._batches_ahead, self._steps_after(step))):
            self._ahead.append((later, self._submit(later)))

    def _drop_ahead(self) -> None:
        for _, pending in self._ahead:
            for task in pending.tasks:
                task.cancel()
        self._ahead.clear()

    def _submit(self, step: int) -> _Pending:
        """Start the work for one batch, in threads."""
        ids = self._share.ids_at(step)
        random = self._randomness(ids, step) if self.order.training else None
        size = self._sizes.at(step)
        if self._cached is not None:
            return self._submit_selection(self._cached, ids, random, size)
        if self._some_are_fetched:
            self._fetch_ahead(step)
        cropped = self.order.training and self.data.crop == "random-resized-crop"
        decoded_size = size if cropped else self._whole_size
        if self._gpu_fill is not None:
            return self._submit_to_gpu(self._gpu_fill, ids, random, (decoded_size, size))
        samples = self._around(self._buffers.take((len(ids), size, size, self.data.channels)))
        tasks = self._submit_decoding(samples, ids, self._share.blocks, random, decoded_size)
        return _Pending(ids, tasks, lambda: self._copies.begin(samples))

    def _submit_to_gpu(
        self, fill: GpuFill, ids: NDArray[np.int64], random: Randomness | None, sizes: tuple[int, int]
    ) -> _Pending:
        """Start the threads that read a batch, and the one that waits for them and lets the GPU make it."""
        parts = [part_MR for rows_MR in self._share.blocks for part_MR in parts_of(rows_MR, sizes[1])]
        reads, made = fill.submit(self._pool, ids, parts, random, sizes)
        return _Pending(ids, [*reads, made], made.result)

    def _around(self, images_NSSC: Tensor) -> Samples:
        """Return samples around a buffer, with labels and weights in pinned memory too where a GPU copies them."""
        samples = Samples.around(images_NSSC)
        return samples.pinned() if self._to_gpu else samples

    def _submit_selection(
        self, cached: Samples, ids: NDArray[np.int64], random: Randomness | None, size: int
    ) -> _Pending:
        """Select a batch from the cached set."""
        if self.data.cache == "device":
            # Use no thread: the device runs its work in sequence anyway.
            selected = cached.select(ids, self.data, random, size)
            return _Pending(ids, [], lambda: self._copies.begin(selected))
        task = self._pool.submit(self._select, cached, ids, random, size)
        return _Pending(ids, [task], lambda: self._copies.begin(task.result()))

    def _select(
        self, cached: Samples, ids: NDArray[np.int64], random: Randomness | None, size: int
    ) -> Samples:
        selected = cached.select(ids, self.data, random, size)
        return selected.pinned() if self._to_gpu else selected

    def _randomness(self, ids: NDArray[np.int64], step: int) -> Randomness:
        epoch = step // self.order.steps_per_epoch
        return randomness(ids, self.data, seed=self._seed, epoch=epoch, copies_N=self._share.copies_B)

    def _fetch_ahead(self, step: int) -> None:
        """Request shards early: a window of samples and half a shard before the first step that reads them."""
        steps = min(self.order.fetch_steps, self._steps_after(step))
        wanted = self.order.shards_ahead(step, self._share.lanes, 1 + steps)
        self._reader.want(number for number in wanted if number not in self._wanted)
        self._wanted = set(wanted)

    def _submit_decoding(
        self,
        samples: Samples,
        ids: NDArray[np.int64],
        blocks: Sequence[NDArray[np.int64]],
        random: Randomness | None,
        size: int,
    ) -> list[Future[None]]:
        return [
            self._pool.submit(self._decoder.fill, samples, ids, part_MR, random, size)
            for rows_MR in blocks
            for part_MR in parts_of(rows_MR, size)
        ]

    def _decode_all(self) -> Samples:
        """Decode every image of the index at one size, without augmentation."""

        def fill(chunk: Samples, ids: NDArray[np.int64]) -> None:
            rows = [np.arange(len(ids))[:, None]]
            for task in self._submit_decoding(chunk, ids, rows, None, self._whole_size):
                task.result()

        device = self._device if self.data.cache == "device" else torch.device("cpu")
        return keep_all(self.index.num_samples, self._whole_size, self.data, device, self._buffers, fill)


@dataclass
class _Pending:
    """A batch that threads are filling."""

    ids_B: NDArray[np.int64]
    tasks: Sequence[Future[Any]]
    bring: Callable[[], Begun]  # begins to bring it to the device; to be called when the tasks are done
    copied: Begun | None = None

    def is_done(self) -> bool:
        """Report whether all tasks are done, and none has failed: its turn is the time to raise an error."""
        return all(task.done() and task.exception() is None for task in self.tasks)
