"""Warps: pixels change places, as behind frosted glass, or along an elastic field."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from resnet_dist.data.images.corruptions.chance import Chance

Floats = NDArray[Any]  # float32


def glass_blur(image: Floats, strength: tuple[float, float, float], chance: Chance) -> Floats:
    """Swap every pixel with one nearby, between two blurs.

    strength: standard deviation of the blurs, the farthest place of a partner in pixels, and rounds of swaps.
    """
    deviation, farthest, rounds = strength
    size, reach = image.shape[0], max(1, round(farthest))
    pixels = smoothed(image, deviation, 4).reshape(size * size, image.shape[2])
    order = shuffled(size, reach, int(rounds), chance)
    return smoothed(pixels[order].reshape(image.shape), deviation, 4)


def elastic_transform(image: Floats, strength: tuple[float, float, float], chance: Chance) -> Floats:
    """Turn, shear and stretch the image, and pull each pixel along a smooth random field.

    strength: length of the field and its smoothness, and the farthest that a corner of the square in the middle moves,
    in pixels.
    """
    length, smoothness, farthest = strength
    size = image.shape[0]
    middle, half = size // 2, max(1, size // 3)
    corners_32 = middle + half * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    moved_32 = corners_32 + farthest * (2 * chance.uniform(3, 2) - 1)
    draws_SS2 = (2 * chance.uniform(size, size, 2) - 1).astype(np.float32)
    field_SS2 = length * smoothed(draws_SS2, smoothness, 3)  # wide curves: means of many draws, near zero
    right, down = np.meshgrid(np.arange(size), np.arange(size))
    places_SS2 = np.stack([right, down], axis=2) + field_SS2
    # The affine map that brings the moved corners back: where a pixel of the result comes from.
    back_32 = np.linalg.solve(np.column_stack([moved_32, np.ones(3)]), corners_32)
    return sampled(image, places_SS2 @ back_32[:2] + back_32[2])


def shuffled(size: int, reach: int, rounds: int, chance: Chance) -> NDArray[np.int64]:
    """Return the pixels of an image, numbered row by row, after swaps with partners up to `reach` pixels away.

    The pixels within `reach` of an edge begin no swap; a partner is at most reach - 1 pixels down or to the right.
    """
    order = list(range(size * size))
    inside = np.arange(size - reach, reach, -1)
    places = (inside[:, None] * size + inside).ravel()
    for _ in range(rounds):
        moves = np.floor(2 * reach * chance.uniform(2, len(places))).astype(np.int64) - reach
        partners = places + moves[0] * size + moves[1]
        # One after the other: a pixel may be carried on by a later swap.
        for place, partner in zip(places.tolist(), partners.tolist(), strict=True):
            order[place], order[partner] = order[partner], order[place]
    return np.array(order)


def smoothed(image: Floats, deviation: float, cut: float) -> Floats:
    """Return the image under a bell curve of `deviation` pixels, cut off at `cut` deviations; edges are reflected."""
    size = image.shape[0]
    rows = _bell(size, deviation, cut)
    found: Floats = rows @ (rows @ image.reshape(size, -1)).reshape(image.shape)
    return found


@lru_cache(maxsize=16)
def _bell(size: int, deviation: float, cut: float) -> Floats:
    """Return the matrix (size, size) that smooths a line of pixels: a curve may be wider than the image."""
    half = int(cut * deviation + 0.5)
    steps = np.arange(-half, half + 1)
    weights = np.exp(-(steps**2) / (2 * max(deviation, 1e-6) ** 2))
    places = np.pad(np.arange(size), half, mode="symmetric")
    matrix = np.zeros((size, size))
    for row in range(size):
        np.add.at(matrix[row], places[row : row + len(steps)], weights / weights.sum())
    return matrix.astype(np.float32)


def sampled(image: Floats, places_SS2: NDArray[Any]) -> Floats:
    """Return the image at places (right, down), interpolated; beyond an edge it is reflected."""
    grid = places_SS2 * (2 / max(1, image.shape[0] - 1)) - 1
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
    out = F.grid_sample(
        planes, torch.from_numpy(grid.astype(np.float32))[None], padding_mode="reflection", align_corners=True
    )
    return out[0].numpy().transpose(1, 2, 0)
