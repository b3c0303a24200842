"""Noise: of low light (gaussian), of few photons (shot), and of broken bits (impulse)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data.images.corruptions.chance import Chance

Floats = NDArray[Any]  # float32
LEVELS = 256  # values of a channel of an image


def gaussian_noise(image: Floats, strength: tuple[float], chance: Chance) -> Floats:
    """Add a draw to every value. strength: standard deviation."""
    found: Floats = (image + strength[0] * chance.normal(*image.shape)).astype(np.float32)
    return found


def shot_noise(image: Floats, strength: tuple[float], chance: Chance) -> Floats:
    """Draw every value anew from a Poisson distribution. strength: photons of a white pixel."""
    table, width = _poisson_table(strength[0])
    levels = np.rint(image * (LEVELS - 1)).astype(np.int64)
    # The rows of the table lie one above the other: row v holds v .. v + 1.
    places = np.searchsorted(table, chance.uniform(*image.shape) + levels, side="right")
    found: Floats = ((places - levels * width) / strength[0]).astype(np.float32)
    return found


def impulse_noise(image: Floats, strength: tuple[float], chance: Chance) -> Floats:
    """Set some values to black or white. strength: share of the values."""
    draws, half = chance.uniform(*image.shape), strength[0] / 2
    found: Floats = np.where(draws < half, 0, np.where(draws >= 1 - half, 1, image)).astype(np.float32)
    return found


@lru_cache(maxsize=16)
def _poisson_table(photons: float) -> tuple[NDArray[np.float64], int]:
    """Return the distribution functions of all levels, each raised by its level, and the length of one."""
    width = int(photons + 12 * np.sqrt(photons)) + 12
    counts = np.arange(width)
    means = photons * np.arange(LEVELS)[:, None] / (LEVELS - 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(counts[1:]))])
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = counts * np.log(means) - means - log_factorials
    chances = np.where(means == 0, counts == 0, np.exp(logs))
    table = np.minimum(np.cumsum(chances, axis=1), 1.0)
    table[:, -1] = 1.0
    return (table + np.arange(LEVELS)[:, None]).ravel(), width
