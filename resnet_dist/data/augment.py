"""Per-sample transforms: pixels of any size → pixels of the recipe's size, drawn from the sample's identity.

Shapes: H height, W width, C channels, S the image size that the model sees.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from resnet_dist.config import Data
from resnet_dist.data.decode import Pixels
from resnet_dist.data.philox import Purpose, Words, uniform, words_of

CROP_TRIES = 10  # as torchvision's RandomResizedCrop
_BLOCKS = 1 + CROP_TRIES  # of four words: flip and shift, then one a try


class Box(NamedTuple):
    top: int
    left: int
    height: int
    width: int


def augment_words(ids: NDArray[np.int64], data: Data, *, seed: int, epoch: int) -> Words:
    """The random words of a batch, one row a sample: the same on any rank, in any epoch's restart."""
    blocks = _BLOCKS if data.crop == "random-resized-crop" else 1
    return words_of(ids, Purpose.AUGMENT, seed=seed, epoch=epoch, blocks=blocks)


def train_pixels(pixels_HWC: Pixels, words: Words, data: Data) -> Pixels:
    """One augmented training image: (H, W, C) → (S, S, C)."""
    size, draws = data.image_size, uniform(words)
    if data.crop == "random-resized-crop":
        box = random_box(pixels_HWC.shape[0], pixels_HWC.shape[1], draws[4:])
        out = resize(cut(pixels_HWC, box), size, size)
    elif data.crop == "pad-crop":
        out = pad_and_crop(eval_pixels(pixels_HWC, data), data.pad, draws[1], draws[2])
    else:
        out = eval_pixels(pixels_HWC, data)
    return out[:, ::-1] if data.flip and draws[0] < 0.5 else out


def eval_pixels(pixels_HWC: Pixels, data: Data) -> Pixels:
    """The whole image, its short side resized and its middle cut out: (H, W, C) → (S, S, C)."""
    size = data.image_size
    height, width = pixels_HWC.shape[:2]
    scale = size / min(height, width)
    resized = resize(pixels_HWC, max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return cut(resized, Box(top, left, size, size))


def random_box(height: int, width: int, draws: NDArray[np.float64]) -> Box:
    """A box of 8 to 100 % of the area and 3:4 to 4:3 in shape, as Inception's (arXiv 1409.4842) crop."""
    for area_draw, ratio_draw, top_draw, left_draw in draws.reshape(-1, 4):
        area = height * width * (0.08 + 0.92 * area_draw)
        ratio = math.exp(math.log(3 / 4) + ratio_draw * 2 * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w)
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # the largest legal middle
    return Box((height - h) // 2, (width - w) // 2, h, w)


def pad_and_crop(pixels_SSC: Pixels, pad: int, top_draw: float, left_draw: float) -> Pixels:
    """Zeros of `pad` pixels on every side, then a random crop of the old size."""
    size = pixels_SSC.shape[0]
    padded = np.pad(pixels_SSC, ((pad, pad), (pad, pad), (0, 0)))
    return cut(padded, Box(int(top_draw * (2 * pad + 1)), int(left_draw * (2 * pad + 1)), size, size))


def cut(pixels_HWC: Pixels, box: Box) -> Pixels:
    return pixels_HWC[box.top : box.top + box.height, box.left : box.left + box.width]


def resize(pixels_HWC: Pixels, height: int, width: int) -> Pixels:
    """Antialiased bilinear, as Pillow's: (H, W, C) → (height, width, C)."""
    if pixels_HWC.shape[:2] == (height, width):
        return pixels_HWC
    # A view with channels last in memory: torch then takes its vectorised uint8 path.
    images_NCHW = torch.from_numpy(np.ascontiguousarray(pixels_HWC)).permute(2, 0, 1)[None]
    out = F.interpolate(images_NCHW, (height, width), mode="bilinear", antialias=True)
    resized: Pixels = out[0].permute(1, 2, 0).numpy()
    return resized


def normalize(images_NHWC: torch.Tensor, data: Data, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 (N, H, W, C) → (N, C, H, W) of zero mean and unit variance, on the images' device.

    Bytes travel to the device, a quarter of what floats would; the result is channels-last in memory.
    """
    mean, scale = _normalization(data.mean, data.std, images_NHWC.device, dtype)
    return images_NHWC.permute(0, 3, 1, 2).to(dtype).sub(mean).mul(scale)


@lru_cache(maxsize=8)  # a new tensor each step would copy to the device, and wait for it
def _normalization(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    mean_1C11 = torch.tensor(mean, dtype=torch.float64)[None, :, None, None] * 255
    scale_1C11 = 1 / (torch.tensor(std, dtype=torch.float64)[None, :, None, None] * 255)
    return mean_1C11.to(device, dtype), scale_1C11.to(device, dtype)
