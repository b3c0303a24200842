"""The view of an image that evaluation and prediction have: its middle, resized to a square and normalized.

Shapes: N images, H height, W width, S size of a square, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .opened import Box, Image, Pixels, scale_for

if TYPE_CHECKING:

    class ViewOptions(Protocol):
        """The fields of a recipe's data on which the view depends."""

        @property
        def evaluation_size(self) -> int: ...
        @property
        def eval_crop(self) -> float: ...
        @property
        def eval_resize(self) -> str: ...


def evaluation_view(image: Image, options: ViewOptions) -> Pixels:
    """Return what evaluation sees of an image: (S, S, C) uint8.

    The pixels are valid until this thread asks for those of the next image. Raises ValueError where the image cannot
    be decoded.
    """
    size, share = options.evaluation_size, options.eval_crop
    if is_whole(image, size, share):
        return image.pixels(Box(0, 0, size, size), size)
    box = middle(image.height, image.width, size, share)
    return resize(image.pixels(box, size), size, size, options.eval_resize)


def is_whole(image: Image, size: int, share: float) -> bool:
    """Report whether the view is the image itself."""
    return share == 1 and image.height == image.width == size


def middle(height: int, width: int, size: int, share: float) -> Box:
    """Return the square in the middle, whose side is `share` of the short side, laid on the grid for `size`."""
    side = max(1, round(min(height, width) * share))
    return on_grid(Box((height - side) // 2, (width - side) // 2, side, side), size)


def on_grid(box: Box, size: int) -> Box:
    """Return `box`, moved and shrunk by less than the scale at which it will be decoded."""
    scale = scale_for(box.height, box.width, size)
    return box if scale == 1 else Box(*(edge // scale * scale for edge in box))


def resize(pixels_HWC: Pixels, height: int, width: int, mode: str = "bilinear") -> Pixels:
    """Resize one image as Pillow does, antialiased: (H, W, C) → (height, width, C). mode: bilinear or bicubic."""
    if min(pixels_HWC.strides) < 0:  # torch does not support negative strides.
        pixels_HWC = np.ascontiguousarray(pixels_HWC)
    if pixels_HWC.shape[:2] == (height, width):
        return pixels_HWC
    # Pass a channels-last view, without a copy: torch then resizes whole pixels, and returns the same layout.
    images_NCHW = torch.from_numpy(pixels_HWC)[None].permute(0, 3, 1, 2)
    out = _resizers[mode](images_NCHW, [height, width], False, None)
    resized: Pixels = out[0].permute(1, 2, 0).numpy()
    return resized


Resizer = Callable[[Tensor, list[int], bool, None], Tensor]


def _resizer(mode: str, operators: object) -> Resizer:
    """Return the operator that F.interpolate calls here, whose own checks take a tenth of the time; else that itself."""
    operator: Resizer | None = getattr(operators, f"_upsample_{mode}2d_aa", None)
    if operator is not None:
        return operator
    return lambda images, size, align_corners, factors: F.interpolate(images, size, mode=mode, antialias=True)


_resizers = {mode: _resizer(mode, getattr(torch._C, "_nn", None)) for mode in ("bilinear", "bicubic")}


def normalize(
    images_NHWC: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return uint8 (N, H, W, C) as (N, C, H, W) of zero mean and unit variance, on the same device.

    mean, std: per channel, of pixels scaled to 0..1. The result is channels-last in memory. Transfer images before
    this call: bytes are a quarter of float32's.
    """
    shift, scale = _normalization(mean, std, images_NHWC.device, dtype)
    return images_NHWC.permute(0, 3, 1, 2).to(dtype, copy=True).sub_(shift).mul_(scale)


# Cache the constants on the device: creating them in every step would copy them there and wait.
@lru_cache(maxsize=8)
def _normalization(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    mean_1C11 = torch.tensor(mean, dtype=torch.float64)[None, :, None, None] * 255
    scale_1C11 = 1 / (torch.tensor(std, dtype=torch.float64)[None, :, None, None] * 255)
    return mean_1C11.to(device, dtype), scale_1C11.to(device, dtype)
