"""Weather: fog, snow, and the brightness of the day."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data.images.corruptions.blur import line, moved, zoomed
from resnet_dist.data.images.corruptions.chance import Chance

Floats = NDArray[Any]  # float32


def fog(image: Floats, strength: tuple[float, float], chance: Chance) -> Floats:
    """Lay a fractal cloud over the image. strength: of the cloud, and how fast its details fade."""
    amount, decay = strength
    highest = image.max()
    cloudy = image + amount * plasma(image.shape[0], decay, chance)[:, :, None]
    found: Floats = (cloudy * highest / (highest + amount)).astype(np.float32)
    return found


def snow(
    image: Floats, strength: tuple[float, float, float, float, float, float, float], chance: Chance
) -> Floats:
    """Let flakes fall over a whitened image.

    strength: mean and deviation of the flakes, their zoom, the threshold below which there is none, half length and
    deviation of their motion, and the share of the image that is not whitened.
    """
    mean, deviation, zoom, threshold, length, spread, share = strength
    size = image.shape[0]
    layer = (mean + deviation * chance.normal(size, size, 1)).astype(np.float32)
    layer = zoomed(layer, zoom)
    layer = np.where(layer < threshold, 0, np.clip(layer, 0, 1)).astype(np.float32)
    angle = -np.pi / 2 + (2 * chance.uniform(1)[0] - 1) * np.pi / 4
    layer = np.clip(moved(layer, line(length, spread, angle)), 0, 1)
    gray = image.mean(axis=2, keepdims=True)
    pale = share * image + (1 - share) * np.maximum(image, gray * 1.5 + 0.5)
    found: Floats = (pale + layer + layer[::-1, ::-1]).astype(np.float32)
    return found


def brightness(image: Floats, strength: tuple[float], chance: Chance) -> Floats:
    """Raise the brightness. strength: added to the value, the largest channel of a pixel."""
    value = image.max(axis=2, keepdims=True)
    raised = np.clip(value + strength[0], 0, 1)
    found: Floats = np.where(value > 0, image * raised / np.where(value > 0, value, 1), raised).astype(
        np.float32
    )
    return found


def plasma(size: int, decay: float, chance: Chance) -> Floats:
    """Return a fractal cloud in 0..1, (size, size), by midpoint displacement on a torus."""
    side = 1 << max(1, (size - 1).bit_length())
    heights = np.zeros((side, side))
    step, wobble = side, 1.0
    # One draw for each cell: a point is displaced once, at the level that reaches it first.
    draws = 2 * chance.uniform(side, side) - 1
    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        sums = corners + np.roll(corners, -1, 0)
        middles = (sums + np.roll(sums, -1, 1)) / 4 + wobble * draws[half::step, half::step]
        heights[half::step, half::step] = middles
        heights[::step, half::step] = (
            corners + np.roll(corners, -1, 1) + middles + np.roll(middles, 1, 0)
        ) / 4 + wobble * draws[::step, half::step]
        heights[half::step, ::step] = (
            corners + np.roll(corners, -1, 0) + middles + np.roll(middles, 1, 1)
        ) / 4 + wobble * draws[half::step, ::step]
        step, wobble = half, wobble / decay
    heights -= heights.min()
    found: Floats = (heights / max(heights.max(), 1e-9))[:size, :size]
    return found
