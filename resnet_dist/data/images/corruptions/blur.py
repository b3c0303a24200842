"""Blur: out of focus, in motion, and while zooming."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from resnet_dist.data.images.corruptions.chance import Chance

Floats = NDArray[Any]  # float32
MAX_ANGLE = np.pi / 4  # of a motion, to both sides of the horizontal


def defocus_blur(image: Floats, strength: tuple[float, float], chance: Chance) -> Floats:
    """Blur by a disk. strength: its radius in pixels, and the standard deviation of the blur of its edge."""
    return filtered(image, _disk(*strength))


def motion_blur(image: Floats, strength: tuple[float, float], chance: Chance) -> Floats:
    """Blur along a line at a random angle. strength: its half length and standard deviation in pixels."""
    angle = (2 * chance.uniform(1)[0] - 1) * MAX_ANGLE
    return moved(image, line(*strength, angle))


def zoom_blur(image: Floats, strength: tuple[float, float], chance: Chance) -> Floats:
    """Average over zooms into the middle. strength: the end of the zoom factors, and their distance."""
    factors = np.arange(1, strength[0], strength[1])
    zooms = [zoomed(image, float(factor)) for factor in factors]
    found: Floats = np.stack([image, *zooms]).mean(axis=0, dtype=np.float32)
    return found


def filtered(image: Floats, kernel: Floats) -> Floats:
    """Return the image under a kernel of an odd side; beyond its edge the image is reflected."""
    pad = kernel.shape[0] // 2
    wide = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect" if image.shape[0] > 1 else "edge")
    planes = torch.from_numpy(np.ascontiguousarray(wide.transpose(2, 0, 1)))[:, None]
    out = F.conv2d(planes, torch.from_numpy(kernel)[None, None])
    return out[:, 0].numpy().transpose(1, 2, 0)


def moved(image: Floats, kernel: Floats) -> Floats:
    """Return the image under a kernel of few weights: they are added one by one, which is faster for a line."""
    size, pad = image.shape[0], kernel.shape[0] // 2
    wide = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect" if size > 1 else "edge")
    out = np.zeros_like(image)
    for down, right in np.argwhere(kernel):
        out += kernel[down, right] * wide[down : down + size, right : right + size]
    return out


def zoomed(image: Floats, factor: float) -> Floats:
    """Return the middle of the image, enlarged by the factor to the size of the whole."""
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
    matrix = torch.tensor([[[1 / factor, 0, 0], [0, 1 / factor, 0]]])
    places = F.affine_grid(matrix, list(planes.shape), align_corners=False)
    out = F.grid_sample(planes, places, padding_mode="reflection", align_corners=False)
    return out[0].numpy().transpose(1, 2, 0)


@lru_cache(maxsize=16)
def _disk(radius: float, deviation: float) -> Floats:
    half = max(1, int(np.ceil(radius)) + int(np.ceil(2 * deviation)))
    down, right = np.mgrid[-half : half + 1, -half : half + 1]
    disk = (down**2 + right**2 <= max(radius, 0.5) ** 2).astype(np.float64)
    weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * deviation**2))
    weights /= weights.sum()
    soft = np.apply_along_axis(np.convolve, 0, disk, weights, "same")
    soft = np.apply_along_axis(np.convolve, 1, soft, weights, "same")
    found: Floats = (soft / soft.sum()).astype(np.float32)
    return found


def line(half_length: float, deviation: float, angle: float) -> Floats:
    """Return a kernel along a line from its middle, whose weights fall as a bell curve of `deviation` pixels."""
    steps = np.arange(2 * round(half_length) + 1)
    weights = np.exp(-(steps**2) / (2 * deviation**2))
    half = len(steps)
    kernel = np.zeros((2 * half + 1, 2 * half + 1))
    down, right = half + steps * np.sin(angle), half + steps * np.cos(angle)
    low_down, low_right = np.floor(down).astype(int), np.floor(right).astype(int)
    # Share each weight among the four pixels around its place.
    for at_down, share_down in ((low_down, 1 - down + low_down), (low_down + 1, down - low_down)):
        for at_right, share_right in ((low_right, 1 - right + low_right), (low_right + 1, right - low_right)):
            np.add.at(kernel, (at_down, at_right), weights * share_down * share_right)
    found: Floats = (kernel / kernel.sum()).astype(np.float32)
    return found
