"""Operations on the pixels of a batch, on its device: windows, mirrors, rectangles and resizing.

Nothing here is random: the caller passes what is done to which image.

Shapes: N images, B rows of a batch, H height, W width, S size of a square, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from resnet_dist.data.images.device.resize import resize_exactly
from resnet_dist.data.images.draws import Draws
from resnet_dist.data.images.opened import Pixels


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Copy to `device`; to a GPU from pinned memory, so that the host does not wait for the copy."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def resize_batch(images_NSSC: Tensor, size: int) -> Tensor:
    """Resize a batch on its device, to the same bytes on every device: (N, S, S, C) → (N, size, size, C)."""
    if images_NSSC.device.type != "cpu":  # torch has no GPU kernel for bytes.
        return resize_exactly(images_NSSC, size, size)
    out = F.interpolate(images_NSSC.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True)
    return out.permute(0, 2, 3, 1).contiguous()


def windows(
    source_NSSC: Tensor,
    rows_B: NDArray[np.int64],
    down_B: NDArray[np.int64],
    right_B: NDArray[np.int64],
    size: int,
) -> Tensor:
    """Return images `rows_B`, each seen through a window, (B, size, size, C); black outside the image.

    down_B, right_B: pixels from the corner of the image to that of the window, negative for up and left.
    """
    wide = source_NSSC.shape[1]
    down_BS, right_BS = down_B[:, None] + np.arange(size), right_B[:, None] + np.arange(size)
    if source_NSSC.device.type == "cpu":
        out = _rows_at(source_NSSC.numpy(), rows_B[:, None] * wide + down_BS, right_B)
    else:
        down, right = (to_device(moved, source_NSSC.device) for moved in (down_BS, right_BS))
        out = pixels_at(source_NSSC, rows_B, down, right)
    for moved_BS, view in ((down_BS, out), (right_BS, out.transpose(1, 2))):
        outside = np.nonzero((moved_BS < 0) | (moved_BS >= wide))
        if out.device.type == "cpu":
            view.numpy()[outside] = 0  # NumPy takes half the time of torch.
        elif len(outside[0]):
            view[tuple(to_device(i, out.device) for i in outside)] = 0
    return out


def reflected_windows(
    source_NSSC: Tensor,
    rows_B: NDArray[np.int64],
    down_B: NDArray[np.int64],
    right_B: NDArray[np.int64],
    size: int,
) -> Tensor:
    """Return what `windows` returns, with the reflection of the image outside of it. Moves are less than its size."""
    last = source_NSSC.shape[1] - 1

    def inside(moved_B: NDArray[np.int64]) -> Tensor:
        moved_BS = np.abs(moved_B[:, None] + np.arange(size))
        return to_device(np.where(moved_BS > last, 2 * last - moved_BS, moved_BS), source_NSSC.device)

    return pixels_at(source_NSSC, rows_B, inside(down_B), inside(right_B))


def pixels_at(source_NSSC: Tensor, rows_B: NDArray[np.int64], down_BS: Tensor, right_BS: Tensor) -> Tensor:
    """Return the pixels of images `rows_B` at rows `down_BS` and columns `right_BS`, (B, S, S, C).

    A position outside the image gives the nearest pixel inside.
    """
    size = source_NSSC.shape[1]
    first_B1 = to_device(rows_B, source_NSSC.device)[:, None] * size
    rows_BS = first_B1 + down_BS.clamp(0, size - 1)
    return source_NSSC.flatten(0, 2)[rows_BS[:, :, None] * size + right_BS.clamp(0, size - 1)[:, None, :]]


def _rows_at(pixels_NSSC: Pixels, rows_BS: NDArray[np.int64], right_B: NDArray[np.int64]) -> Tensor:
    """Copy rows of pixels at once instead of single pixels: row numbers count through all images."""
    n, wide, _, channels = pixels_NSSC.shape
    size = rows_BS.shape[1]
    # View the memory as overlapping items of size * channels bytes, one that begins at every pixel.
    row = np.dtype((np.void, size * channels))
    all_rows = np.ndarray((n * wide * wide - size + 1,), row, pixels_NSSC, 0, (channels,))
    first_BS = rows_BS * wide + right_B[:, None]
    inside_BS = first_BS.clip(0, len(all_rows) - 1)
    out = all_rows[inside_BS].view(np.uint8).reshape(len(right_B), size, size, channels)
    # Repair the first and the last rows in memory: they cannot be read beyond the ends, so they were read inside
    # and are rotated now. `windows` paints the pixels outside the image.
    for image, line in zip(*np.nonzero(first_BS != inside_BS), strict=True):
        moved = first_BS[image, line] - inside_BS[image, line]
        out[image, line] = np.roll(out[image, line], -moved, axis=0)
    return torch.from_numpy(out)


def flip_(images_NSSC: Tensor, flip_N: NDArray[np.bool]) -> None:
    """Mirror the marked images left to right, in place."""
    rows = np.flatnonzero(flip_N)
    images = mirrored(take(images_NSSC, rows))
    if images_NSSC.device.type == "cpu":
        images_NSSC.numpy()[rows] = images.numpy()
    else:
        images_NSSC[to_device(rows, images_NSSC.device)] = images


def mirrored(images_NSSC: Tensor) -> Tensor:
    # Pass a channels-last view: torch has a vectorized mirror for this layout.
    return images_NSSC.permute(0, 3, 1, 2).flip(-1).permute(0, 2, 3, 1)


def take(source_NSSC: Tensor, rows_B: NDArray[np.int64]) -> Tensor:
    """Copy images `rows_B`. On a CPU NumPy does it: it copies whole images, several times faster than torch."""
    if source_NSSC.device.type == "cpu":
        return torch.from_numpy(source_NSSC.numpy()[rows_B])
    return source_NSSC.index_select(0, to_device(rows_B, source_NSSC.device))


def erased(
    images_NSSC: Tensor, chosen_N: NDArray[np.bool], draws_N4: Draws, mean: tuple[float, ...]
) -> Tensor:
    """Paint a rectangle of the chosen images with the mean color (random erasing, arXiv 1708.04896).

    It has 2 to 33 % of the area, and 0.3 to 3.3 in shape. mean: per channel, of pixels scaled to 0..1.
    """
    size, device = images_NSSC.shape[1], images_NSSC.device
    area, ratio = size * size * (0.02 + 0.31 * draws_N4[:, 0]), 0.3 * (3.3 / 0.3) ** draws_N4[:, 1]
    high = np.clip(np.sqrt(area / ratio).round(), 1, size) * chosen_N
    broad = np.clip(np.sqrt(area * ratio).round(), 1, size) * chosen_N
    top, left = np.floor(draws_N4[:, 2] * (size - high + 1)), np.floor(draws_N4[:, 3] * (size - broad + 1))
    edges_4N = to_device(np.stack([top, top + high, left, left + broad]), device)
    at_S = torch.arange(size, device=device)
    down_NS = (at_S >= edges_4N[0][:, None]) & (at_S < edges_4N[1][:, None])
    right_NS = (at_S >= edges_4N[2][:, None]) & (at_S < edges_4N[3][:, None])
    paint = to_device(np.array([round(255 * value) for value in mean], np.uint8), device)
    return torch.where((down_NS[:, :, None] & right_NS[:, None, :])[..., None], paint, images_NSSC)
