"""Fill batches on a GPU: threads read samples and choose boxes, the GPU decodes, resizes and augments them.

Order, boxes and draws are those of fill.py, and so is what becomes of a bad sample.

Shapes: M samples of a task, R copies of each, B rows of a batch, S image size, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.config import Data
from resnet_dist.data.batches.device_copies import Begun
from resnet_dist.data.batches.fill import views_of
from resnet_dist.data.batches.resident import Samples
from resnet_dist.data.images.augment import augment_
from resnet_dist.data.images.crop import boxes_of, resize_mode, to_sizes
from resnet_dist.data.images.decode import open_image
from resnet_dist.data.images.device.codec import Codec, resize_box
from resnet_dist.data.images.draws import Draws, Randomness
from resnet_dist.data.images.opened import Box, Image
from resnet_dist.data.shards.labels import check_label
from resnet_dist.data.shards.reader import BadSample, ShardReader
from resnet_dist.errors import UserError
from resnet_dist.order.samples import PADDING


@dataclass(frozen=True)
class View:
    """One row of a batch: an image whose header has been read, and what to take of it."""

    row: int
    key: int  # sample id
    label: int
    image: Image
    box: Box
    draws: Draws | None
    mirror: bool


@dataclass
class Rows:
    """The samples of a batch that a thread has read."""

    views: list[View]
    bad: dict[int, str]  # row → key and reason


class GpuFill:
    """Fills batches on a device. Any number of threads may call `read` at once, and one `finish`."""

    def __init__(
        self, reader: ShardReader, num_classes: int, data: Data, codec: Codec, device: torch.device
    ) -> None:
        self._reader, self._num_classes, self._data = reader, num_classes, data
        self._codec, self._device = codec, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.num_on_cpu = 0  # images that the codec could not decode
        self.thread = ThreadPoolExecutor(1, "decode-gpu")  # the one that calls `finish`

    def submit(
        self,
        pool: ThreadPoolExecutor,
        ids_B: NDArray[np.int64],
        parts: Sequence[NDArray[np.int64]],
        random: Randomness | None,
        sizes: tuple[int, int],
    ) -> tuple[list[Future[Rows]], Future[Begun]]:
        """Start to read the parts of a batch in `pool`, and to make the batch of them; see `read` and `finish`."""
        reads = [pool.submit(self.read, ids_B, part_MR, random, sizes[0]) for part_MR in parts]

        def make() -> Begun:
            return self.finish([read.result() for read in reads], len(ids_B), random, sizes)

        return reads, self.thread.submit(make)

    def read(
        self, ids_B: NDArray[np.int64], rows_MR: NDArray[np.int64], random: Randomness | None, size: int
    ) -> Rows:
        """Read M samples and choose the boxes of all their copies.

        Raises StorageError or IndexMismatch where a shard cannot be read.
        """
        rows, copies = Rows([], {}), rows_MR.shape[1]
        part = None if random is None else random.rows(rows_MR.ravel())
        ids_M = ids_B[rows_MR[:, 0]]
        places, views_M = self._reader.locate(ids_M), views_of(len(ids_M), copies, part)
        for sample_id, place, views, own in zip(
            ids_M.tolist(), places, views_M, rows_MR.tolist(), strict=True
        ):
            if sample_id == PADDING:
                continue
            try:
                encoded, label = self._reader.read_at(*place)
                image = open_image(encoded, self._data.channels, self._data.max_pixels)
                label = check_label(label, self._num_classes)
            except UserError:  # It is a ValueError too, but not the sample's fault.
                raise
            except (BadSample, ValueError) as problem:
                rows.bad.update(dict.fromkeys(own, f"{self._reader.key(sample_id)}: {problem}"))
                continue
            # A view of the whole image serves all copies.
            crops, mirrors = (sides * (copies // len(sides)) for sides in map(tuple, views))
            boxes = boxes_of(image, self._data, crops, size)
            rows.views += map(
                View, own, [sample_id] * copies, [label] * copies, [image] * copies, boxes, crops, mirrors
            )
        return rows

    def finish(
        self, parts: Sequence[Rows], num_rows: int, random: Randomness | None, sizes: tuple[int, int]
    ) -> Begun:
        """Decode what `read` has read of all rows of a batch; return the samples, and the event of their end.

        sizes: that to which images are decoded, and the batch's, to which augmentation brings them.
        """
        with self._on_stream():
            decoded_size, size = sizes
            views = [view for part in parts for view in part.views]
            labels, weights = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.float32)
            bad = {row: text for part in parts for row, text in part.bad.items()}
            shape = (num_rows, decoded_size, decoded_size, self._data.channels)
            images = torch.zeros(shape, dtype=torch.uint8, device=self._device)
            for view, pixels in zip(views, self._decode(views), strict=True):
                try:
                    images[view.row] = self._square(view, pixels, decoded_size)
                    labels[view.row], weights[view.row] = view.label, 1.0
                except ValueError as problem:
                    bad[view.row] = f"{self._reader.key(view.key)}: {problem}"
            if random is not None:
                images = augment_(images, np.arange(num_rows), self._data, random, size)
            host = Samples(images, torch.from_numpy(labels), torch.from_numpy(weights), bad)
            samples = (host.pinned() if self._stream else host).to(self._device)
            samples.blacken(np.flatnonzero(weights == 0).tolist())
            return samples, self._stream.record_event() if self._stream else None

    def _on_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _decode(self, views: Sequence[View]) -> list[Tensor | None]:
        plain = [view.image.plain_jpeg for view in views]
        wanted = [
            (encoded, view.box) for encoded, view in zip(plain, views, strict=True) if encoded is not None
        ]
        found = iter(self._codec.decode(wanted))
        return [None if encoded is None else next(found) for encoded in plain]

    def _square(self, view: View, pixels: Tensor | None, size: int) -> Tensor:
        """Return the view, (size, size, C), decoded on the CPU where the codec could not. Raises ValueError."""
        if pixels is None:
            self.num_on_cpu += 1
            [found] = to_sizes(view.image, self._data, [view.draws], [view.mirror], size)
            return torch.from_numpy(np.ascontiguousarray(found)).to(self._device)
        square = resize_box(pixels, size, resize_mode(self._data, view.draws))
        return square.flip(1) if view.mirror else square
