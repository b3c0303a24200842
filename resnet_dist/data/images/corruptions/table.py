"""All corruptions by name, with their strengths at severities 1 to 5.

The strengths are those of ImageNet-C's authors: one row for their large images, another one for those of CIFAR-10-C.
Lengths in pixels of large images are theirs at 224 pixels, and grow with the size of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data.images.corruptions import blur, digital, noise, warp, weather
from resnet_dist.data.images.corruptions.chance import Chance

Floats = NDArray[Any]  # float32
Strength = tuple[float, ...]
SEVERITIES = range(1, 6)
SMALL_SIZE = 64  # pixels, up to which the strengths are those of CIFAR-10-C
LARGE_SIZE = 224  # pixels, at which the lengths of large images hold
DIFFERENCES = (
    "not ImageNet-C itself: 14 of its 15 corruptions (no frost, which is made of photographs), computed on the resized and "
    "cropped pixels of evaluation, with draws of their own from each sample's id, not stored as JPEG; means are of "
    "accuracy, not relative to AlexNet's errors"
)


@dataclass(frozen=True)
class Corruption:
    """A corruption. lengths: the places of a strength that are pixels."""

    number: int  # It decides what every sample draws: never change one.
    apply: Callable[[Floats, Any, Chance], Floats]
    small: Sequence[Strength]
    large: Sequence[Strength]
    lengths: tuple[int, ...] = ()

    def strength(self, severity: int, size: int) -> Strength:
        """Return the strength for images of a size in pixels."""
        if size <= SMALL_SIZE:
            return tuple(self.small[severity - 1])
        values = self.large[severity - 1]
        scale = size / LARGE_SIZE
        return tuple(value * scale if n in self.lengths else value for n, value in enumerate(values))


def _row(*values: float) -> list[Strength]:
    return [(value,) for value in values]


def _times(size: int, *shares: Strength) -> list[Strength]:
    return [tuple(size * share for share in strength) for strength in shares]


CORRUPTIONS = {
    "gaussian_noise": Corruption(
        1, noise.gaussian_noise, _row(0.04, 0.06, 0.08, 0.09, 0.10), _row(0.08, 0.12, 0.18, 0.26, 0.38)
    ),
    "shot_noise": Corruption(2, noise.shot_noise, _row(500, 250, 100, 75, 50), _row(60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(
        3, noise.impulse_noise, _row(0.01, 0.02, 0.03, 0.05, 0.07), _row(0.03, 0.06, 0.09, 0.17, 0.27)
    ),
    "defocus_blur": Corruption(
        4,
        blur.defocus_blur,
        [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
        (0,),
    ),
    "motion_blur": Corruption(
        5,
        blur.motion_blur,
        [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
        [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
        (0, 1),
    ),
    "zoom_blur": Corruption(
        6,
        blur.zoom_blur,
        [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.33, 0.03)],
    ),
    "snow": Corruption(
        7,
        weather.snow,
        [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ],
        [
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
        (4, 5),
    ),
    "fog": Corruption(
        8,
        weather.fog,
        [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
        [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    ),
    "brightness": Corruption(
        9, weather.brightness, _row(0.05, 0.1, 0.15, 0.2, 0.3), _row(0.1, 0.2, 0.3, 0.4, 0.5)
    ),
    "contrast": Corruption(
        10, digital.contrast, _row(0.75, 0.5, 0.4, 0.3, 0.15), _row(0.4, 0.3, 0.2, 0.1, 0.05)
    ),
    "pixelate": Corruption(
        11, digital.pixelate, _row(0.95, 0.9, 0.85, 0.75, 0.65), _row(0.6, 0.5, 0.4, 0.3, 0.25)
    ),
    "jpeg_compression": Corruption(
        12, digital.jpeg_compression, _row(80, 65, 58, 50, 40), _row(25, 18, 15, 10, 7)
    ),
    "glass_blur": Corruption(
        13,
        warp.glass_blur,
        [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
        [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
        (0, 1),
    ),
    "elastic_transform": Corruption(
        14,
        warp.elastic_transform,
        _times(32, (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        # Theirs are multiples of 244 for images of 224.
        _times(
            244, (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)
        ),
        (0, 1, 2),
    ),
}


def corrupt(pixels_SSC: NDArray[np.uint8], sample_id: int, name: str, severity: int) -> NDArray[np.uint8]:
    """Return an image under the corruption `name`, as new pixels. severity: 1 to 5."""
    corruption = CORRUPTIONS[name]
    image = pixels_SSC.astype(np.float32) / 255
    chance = Chance(sample_id, corruption.number * 8 + severity)
    found = corruption.apply(image, corruption.strength(severity, image.shape[0]), chance)
    pixels: NDArray[np.uint8] = np.rint(np.clip(found, 0, 1) * 255).astype(np.uint8)
    return pixels
