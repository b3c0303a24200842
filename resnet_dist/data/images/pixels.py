"""What moves pixels: windows, mirrors, rectangles and resizing, of one image or of a batch on its device.

Nothing here draws anything: what is done to which image is an argument.

Shapes: N images, B rows of a batch, H height, W width, S size of a square, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from resnet_dist.data.images.decode import Pixels

Draws = NDArray[np.float64]


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """On a GPU without waiting for it: from memory that it can read by itself, beside what it computes."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def resize(pixels_HWC: Pixels, height: int, width: int) -> Pixels:
    """Antialiased bilinear, as Pillow's: (H, W, C) → (height, width, C)."""
    if min(pixels_HWC.strides) < 0:  # torch knows no negative strides
        pixels_HWC = np.ascontiguousarray(pixels_HWC)
    if pixels_HWC.shape[:2] == (height, width):
        return pixels_HWC
    # Seen as N C H W with channels last in memory, also of a cut: torch then resizes whole pixels, and answers so.
    images_NCHW = torch.from_numpy(pixels_HWC)[None].permute(0, 3, 1, 2)
    out = F.interpolate(images_NCHW, (height, width), mode="bilinear", antialias=True)
    resized: Pixels = out[0].permute(1, 2, 0).numpy()
    return resized


def resize_batch(images_NSSC: Tensor, size: int) -> Tensor:
    """As `resize`, of a batch where it is: (N, S, S, C) → (N, size, size, C)."""
    images_NCHW = images_NSSC.permute(0, 3, 1, 2)
    if images_NSSC.device.type == "cpu":
        out = F.interpolate(images_NCHW, (size, size), mode="bilinear", antialias=True)
    else:  # no kernel for bytes there
        out = F.interpolate(images_NCHW.float(), (size, size), mode="bilinear", antialias=True)
        out = out.round().clamp(0, 255).to(torch.uint8)
    return out.permute(0, 2, 3, 1).contiguous()


def windows(
    source_NSSC: Tensor,
    rows_B: NDArray[np.int64],
    down_B: NDArray[np.int64],
    right_B: NDArray[np.int64],
    size: int,
) -> Tensor:
    """Images `rows_B`, each through a window of `size`, its corner moved down and right; black outside the image."""
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
            view.numpy()[outside] = 0  # in half of torch's time
        elif len(outside[0]):
            view[tuple(to_device(i, out.device) for i in outside)] = 0
    return out


def pixels_at(source_NSSC: Tensor, rows_B: NDArray[np.int64], down_BS: Tensor, right_BS: Tensor) -> Tensor:
    """Of images `rows_B`, the pixels at these rows and columns, the nearest where there are none: (B, S, S, C)."""
    size = source_NSSC.shape[1]
    first_B1 = to_device(rows_B, source_NSSC.device)[:, None] * size
    rows_BS = first_B1 + down_BS.clamp(0, size - 1)
    return source_NSSC.flatten(0, 2)[rows_BS[:, :, None] * size + right_BS.clamp(0, size - 1)[:, None, :]]


def _rows_at(pixels_NSSC: Pixels, rows_BS: NDArray[np.int64], right_B: NDArray[np.int64]) -> Tensor:
    """A copy for each row of pixels, not one for each pixel: rows of all images, moved by `right`."""
    n, wide, _, channels = pixels_NSSC.shape
    size = rows_BS.shape[1]
    # A row is one item of size * channels bytes; one begins at every pixel, so they overlap.
    row = np.dtype((np.void, size * channels))
    all_rows = np.ndarray((n * wide * wide - size + 1,), row, pixels_NSSC, 0, (channels,))
    first_BS = rows_BS * wide + right_B[:, None]
    inside_BS = first_BS.clip(0, len(all_rows) - 1)
    out = all_rows[inside_BS].view(np.uint8).reshape(len(right_B), size, size, channels)
    # The first row of all and the last cannot be read as if there were pixels beside them.
    for image, line in zip(*np.nonzero(first_BS != inside_BS), strict=True):
        moved = first_BS[image, line] - inside_BS[image, line]
        out[image, line] = np.roll(out[image, line], -moved, axis=0)
    return torch.from_numpy(out)


def flip_(images_NSSC: Tensor, flip_N: NDArray[np.bool]) -> None:
    """Mirror the images that are marked, in place."""
    rows = np.flatnonzero(flip_N)
    images = mirrored(take(images_NSSC, rows))
    if images_NSSC.device.type == "cpu":
        images_NSSC.numpy()[rows] = images.numpy()
    else:
        images_NSSC[to_device(rows, images_NSSC.device)] = images


def mirrored(images_NSSC: Tensor) -> Tensor:
    # Seen as N C S S with channels last in memory, which has a vectorised mirror.
    return images_NSSC.permute(0, 3, 1, 2).flip(-1).permute(0, 2, 3, 1)


def take(source_NSSC: Tensor, rows_B: NDArray[np.int64]) -> Tensor:
    """A copy of some images. On a CPU by NumPy, which copies whole images and so several times faster."""
    if source_NSSC.device.type == "cpu":
        return torch.from_numpy(source_NSSC.numpy()[rows_B])
    return source_NSSC.index_select(0, to_device(rows_B, source_NSSC.device))


def erased(
    images_NSSC: Tensor, chosen_N: NDArray[np.bool], draws_N4: Draws, mean: tuple[float, ...]
) -> Tensor:
    """A rectangle of 2 to 33 % of the area and 0.3 to 3.3 in shape painted over (arXiv 1708.04896)."""
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
