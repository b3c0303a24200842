"""Shards of noise images, for benches that need no data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg

from resnet_dist.data.prepare.items import Item, Source
from resnet_dist.data.prepare.split import prepare

CLASSES = 10


@dataclass(frozen=True)
class Noise:
    """A JPEG file of noise, different for every number, which is made when it is read."""

    number: int
    size: int

    def __call__(self) -> bytes:
        pixels = np.random.default_rng(self.number).integers(0, 256, (self.size, self.size, 3), np.uint8)
        encoded: bytes = simplejpeg.encode_jpeg(pixels, 75)
        return encoded


def write_noise(folder: Path, size: int, *, train: int, evaluation: int) -> None:
    """Write shards with an index to the folders train and eval in `folder`.

    size: height and width of the images in pixels. train, evaluation: the number of images in each.
    """

    def items(first: int, count: int) -> list[Item]:
        numbers = range(first, first + count)
        return [Item(number % CLASSES, "jpg", Noise(number, size), str(number)) for number in numbers]

    names = tuple(str(number) for number in range(CLASSES))
    prepare(Source("noise", names, {"train": items(0, train), "eval": items(train, evaluation)}), folder)
