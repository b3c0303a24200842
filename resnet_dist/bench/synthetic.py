"""Images of noise as shards, for benches that are not to depend on anybody's data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg

from resnet_dist.data.prepare.sources import Item, Source
from resnet_dist.data.prepare.split import prepare

CLASSES = 10


@dataclass(frozen=True)
class Noise:
    """The JPEG file of a number: another picture for each, made when it is read."""

    number: int
    size: int

    def __call__(self) -> bytes:
        pixels = np.random.default_rng(self.number).integers(0, 256, (self.size, self.size, 3), np.uint8)
        encoded: bytes = simplejpeg.encode_jpeg(pixels, 75)
        return encoded


def write_noise(folder: Path, size: int, *, train: int, evaluation: int) -> None:
    """`train` and `evaluation` images of size x size pixels as shards with an index, in folders train and eval."""

    def items(first: int, count: int) -> list[Item]:
        numbers = range(first, first + count)
        return [Item(number % CLASSES, "jpg", Noise(number, size), str(number)) for number in numbers]

    names = tuple(str(number) for number in range(CLASSES))
    prepare(Source("noise", names, {"train": items(0, train), "eval": items(train, evaluation)}), folder)
