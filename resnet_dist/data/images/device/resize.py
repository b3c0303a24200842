"""Antialiased bilinear resizing of bytes on any device, to the very bytes of torch's CPU kernel.

torch resizes bytes on a CPU alone. A resizing in floating point differs from it by 1 in a fifth of the values, because
the CPU rounds between columns and rows, and its weights are whole numbers. Here they are whole numbers too: all sums are
exact in float64, so the order of additions, and with it the device, does not matter.

Shapes: N images, H height, W width, C channels; S positions of the result along one axis, L positions of the source.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 256 * 2**20  # of images in float64 at a time
MAX_WEIGHT, MAX_PRECISION = 1 << 15, 22  # The CPU keeps weights in 16 bits.


def resize_exactly(images_NHWC: Tensor, height: int, width: int) -> Tensor:
    """Resize bytes (N, H, W, C) → (N, height, width, C) on their device."""
    per_image = 8 * images_NHWC[0].numel()
    parts = images_NHWC.split(max(1, CHUNK_BYTES // per_image))
    return torch.cat([_resize(part, height, width) for part in parts]).contiguous()


def _resize(images_NHWC: Tensor, height: int, width: int) -> Tensor:
    found = images_NHWC.double()
    for axis, size in ((2, width), (1, height)):  # columns first, as on a CPU
        if found.shape[axis] != size:
            weights_SL, unit = _weights(found.shape[axis], size, found.device)
            summed = torch.einsum("nhlc,sl->nhsc" if axis == 2 else "nlwc,sl->nswc", found, weights_SL)
            found = ((summed + unit / 2) / unit).floor().clamp(0, 255)
    return found.to(torch.uint8)


@lru_cache(maxsize=64)
def _weights(length: int, size: int, device: torch.device) -> tuple[Tensor, int]:
    """Return whole weights (S, L) from `length` to `size` positions, and the number that stands for 1."""
    weights_SL = triangle_weights(length, size)
    precision = 0
    while precision < MAX_PRECISION and int(0.5 + weights_SL.max() * 2 ** (precision + 1)) < MAX_WEIGHT:
        precision += 1
    return torch.from_numpy(np.floor(weights_SL * 2**precision + 0.5)).to(device), 2**precision


def triangle_weights(length: int, size: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return the share (S, L) of each position of the source in each of the result: triangles as wide as two results."""
    scale = length / size
    reach = max(scale, 1.0)
    weights_SL = np.zeros((size, length))
    for position in range(size):
        center = scale * (position + 0.5)
        first, end = max(int(center - reach + 0.5), 0), min(int(center + reach + 0.5), length)
        near = np.maximum(0, 1 - np.abs(np.arange(first, end) - center + 0.5) / reach)
        weights_SL[position, first:end] = near / near.sum()
    return weights_SL
