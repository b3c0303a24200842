"""One thread's task: read, decode and augment samples of the index into rows of a batch.

Shapes: M samples of a task, R copies of each, B rows of a batch, S image size, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from resnet_dist.config import Data
from resnet_dist.data.batches.resident import Samples
from resnet_dist.data.images.augment import augment_
from resnet_dist.data.images.crop import prepared, to_sizes
from resnet_dist.data.images.decode import open_image
from resnet_dist.data.images.draws import Draws, Randomness
from resnet_dist.data.images.opened import Box, Image
from resnet_dist.data.shards.labels import check_label
from resnet_dist.data.shards.reader import BadSample, ShardReader
from resnet_dist.errors import UserError
from resnet_dist.order.samples import PADDING

# The views that are decoded of one image: the draws of each one's crop, and whether each is mirrored.
Views = tuple[Sequence[Draws | None], Sequence[bool]]
WHOLE: Views = (None,), (False,)
# Number in its task, sample id, image, label, views and the boxes of these, of a sample whose header has been read.
_Opened = tuple[int, int, Image, int, Views, list[Box] | None]
MAX_OPENED_BYTES = 4 * 2**20  # of the images that a thread holds at once


class Decoder:
    """Fills batches. Any number of threads may call it at once."""

    def __init__(self, reader: ShardReader, num_classes: int, data: Data) -> None:
        self._reader, self._num_classes, self._data = reader, num_classes, data

    def fill(
        self,
        batch: Samples,
        ids_B: NDArray[np.int64],
        rows_MR: NDArray[np.int64],
        random: Randomness | None,
        size: int,
    ) -> None:
        """Write M samples with all their copies into `batch`, in place.

        ids_B: sample ids of all rows of the batch.
        rows_MR: the rows to fill. With R = 1 they are adjacent.
        random: the draws of all rows of the batch. None: no augmentation.
        size: the size to which images are decoded; augmentation brings them to the batch's.

        A bad sample becomes black with weight 0. Raises StorageError or IndexMismatch where a shard cannot be read.
        """
        single = rows_MR.shape[1] == 1
        rows = slice(int(rows_MR[0, 0]), int(rows_MR[-1, 0]) + 1) if single else rows_MR.ravel()
        # Decode straight into the batch where its rows are adjacent, and of the size that decoding gives.
        in_place = single and size == batch.images_NSSC.shape[1]
        shape = (rows_MR.size, size, size, self._data.channels)
        part = Samples.around(batch.images_NSSC[rows] if in_place else torch.empty(shape, dtype=torch.uint8))
        part_random = None if random is None else random.rows(rows)
        self._decode(part, ids_B[rows_MR[:, 0]], part_random)
        images = part.images_NSSC
        if part_random is not None:
            all_rows = np.arange(rows_MR.size)
            images = augment_(images, all_rows, self._data, part_random, batch.images_NSSC.shape[1])
        if not (in_place and images is part.images_NSSC):
            batch.images_NSSC.numpy()[rows] = images.numpy()
        batch.labels_N.numpy()[rows] = part.labels_N.numpy()
        batch.weights_N.numpy()[rows] = part.weights_N.numpy()
        batch_rows = rows_MR.ravel().tolist()
        bad = {batch_rows[row]: text for row, text in part.bad.items()}
        batch.bad.update(bad)
        batch.blacken(list(bad))

    def _decode(self, part: Samples, ids_M: NDArray[np.int64], random: Randomness | None) -> None:
        """Read and decode each sample once, for all its copies, which are adjacent rows of `part`."""
        copies, size = len(part.images_NSSC) // len(ids_M), part.images_NSSC.shape[1]
        places, views_M = self._reader.locate(ids_M), views_of(len(ids_M), copies, random)
        opened, held_bytes = list[_Opened](), 0
        for number, (sample_id, place, views) in enumerate(zip(ids_M.tolist(), places, views_M, strict=True)):
            if sample_id == PADDING:
                part.images_NSSC.numpy()[number * copies : (number + 1) * copies] = 0
                continue
            try:
                encoded, label = self._reader.read_at(*place)
                image = open_image(encoded, self._data.channels, self._data.max_pixels)
                boxes = prepared(image, self._data, views[0], size)
            except UserError:  # It is a ValueError too, but not the sample's fault.
                raise
            except (BadSample, ValueError) as problem:
                self._mark_bad(part, number, copies, sample_id, problem)
                continue
            opened.append((number, sample_id, image, label, views, boxes))
            held_bytes += image.held_bytes
            if held_bytes > MAX_OPENED_BYTES:
                self._finish(part, copies, opened)
                opened, held_bytes = [], 0
        self._finish(part, copies, opened)

    def _finish(self, part: Samples, copies: int, opened: Sequence[_Opened]) -> None:
        """Decode samples that have been opened, to their rows of `part`."""
        images, labels, weights = part.images_NSSC.numpy(), part.labels_N.numpy(), part.weights_N.numpy()
        size = images.shape[1]
        for number, sample_id, image, label, views, boxes in opened:
            first = number * copies
            # Index by a number where there is one copy: NumPy is faster with it than with a slice.
            rows = first if copies == 1 else slice(first, first + copies)
            try:
                found = to_sizes(image, self._data, *views, size, boxes)
                images[rows] = found[0] if len(found) == 1 else found
                labels[rows] = check_label(label, self._num_classes)
                weights[rows] = 1.0
            except UserError:
                raise
            except ValueError as problem:
                self._mark_bad(part, number, copies, sample_id, problem)

    def _mark_bad(self, part: Samples, number: int, copies: int, sample_id: int, problem: Exception) -> None:
        rows = range(number * copies, (number + 1) * copies)
        part.images_NSSC.numpy()[rows.start : rows.stop] = 0
        part.bad.update(dict.fromkeys(rows, f"{self._reader.key(sample_id)}: {problem}"))


def views_of(count: int, copies: int, random: Randomness | None) -> list[Views]:
    """Return the views to decode of each of `count` samples: one for each copy, or the whole image for all copies."""
    if random is None or not random.crop_NK.size:
        return [WHOLE] * count
    mirror, crops = random.flip_N.tolist(), list(random.crop_NK)
    return [(crops[i : i + copies], mirror[i : i + copies]) for i in range(0, count * copies, copies)]
