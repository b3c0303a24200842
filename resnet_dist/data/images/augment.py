"""Per-sample transforms: pixels of any size → pixels of the step's size, drawn from the sample's identity.

`to_sizes` crops and resizes one image while it is decoded; `augmented` does the rest with a batch of images that
have one size already, on the CPU or on a GPU, and so serves the caches too.

Shapes: N images, R copies of one, H height, W width, C channels, S the image size that the model sees.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.config import Data
from resnet_dist.data.images.decode import Pixels
from resnet_dist.data.images.draws import Randomness
from resnet_dist.data.images.pixels import erased, flip_, resize_batch, take, windows
from resnet_dist.data.images.policy import jitter_color, rand_augment, trivial_augment


def augmented(
    source_NSSC: Tensor, rows_B: NDArray[np.int64], data: Data, random: Randomness | None, size: int
) -> Tensor:
    """Images `rows_B` of `source`, with all that comes after the first stage, at `size`: a new tensor, where it is.

    `random` has a row for each; None only takes them.
    """
    if random is None or recolors(data) or not moves(data, source_NSSC.shape[1], size):
        source_NSSC = take(source_NSSC, rows_B)
        rows_B = np.arange(len(rows_B))
        if random is None:
            return source_NSSC
    return augment_(source_NSSC, rows_B, data, random, size)


def augment_(
    images_NSSC: Tensor, rows_B: NDArray[np.int64], data: Data, random: Randomness, size: int
) -> Tensor:
    """As `augmented`; perhaps in place, where `rows_B` are all rows in their order."""
    wide = images_NSSC.shape[1]
    if recolors(data):
        for row, pixels_SSC in enumerate(images_NSSC.numpy()):
            pixels_SSC[:] = recolored(pixels_SSC, data, random, row)
    if moves(data, wide, size):  # taking and moving images is one copy on a CPU
        places = wide + 2 * data.pad - size + 1  # of the window in the padded image, along each axis
        down_B, right_B = (random.batch_N4[:, 1:3] * places).astype(np.int64).T - data.pad
        images_NSSC = windows(images_NSSC, rows_B, down_B, right_B, size)
    elif wide != size:
        images_NSSC = resize_batch(images_NSSC, size)
    if (
        data.flip and data.crop != "random-resized-crop"
    ):  # whose images are mirrored while they are in the processor's cache
        flip_(images_NSSC, random.flip_N)
    if data.erase:
        chosen_B = random.batch_N4[:, 3] < data.erase
        images_NSSC = erased(images_NSSC, chosen_B, random.erase_N4, data.mean)
    return images_NSSC


def moves(data: Data, wide: int, size: int) -> bool:
    """Whether images of `wide` are seen through a window of `size` that can be at more than one place."""
    return data.crop == "pad-crop" and (data.pad > 0 or size != wide)


def recolors(data: Data) -> bool:
    return data.policy != "none" or data.color_jitter > 0


def recolored(pixels_SSC: Pixels, data: Data, random: Randomness, row: int) -> Pixels:
    """What works on single images: the policy and the colors, by the draws of a row."""
    if data.policy == "rand-augment":
        draws_K4 = random.policy_NK[row].reshape(-1, 4)
        pixels_SSC = rand_augment(pixels_SSC, draws_K4, magnitude=data.policy_magnitude)
    if data.policy == "trivial-augment":
        pixels_SSC = trivial_augment(pixels_SSC, random.policy_NK[row])
    if data.color_jitter:
        pixels_SSC = jitter_color(pixels_SSC, random.color_N4[row], strength=data.color_jitter)
    return pixels_SSC


def normalize(images_NHWC: torch.Tensor, data: Data, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 (N, H, W, C) → (N, C, H, W) of zero mean and unit variance, on the images' device.

    Bytes travel to the device, a quarter of what floats would; the result is channels-last in memory.
    """
    mean, scale = _normalization(data.mean, data.std, images_NHWC.device, dtype)
    return images_NHWC.permute(0, 3, 1, 2).to(dtype, copy=True).sub_(mean).mul_(scale)


@lru_cache(maxsize=8)  # a new tensor each step would copy to the device, and wait for it
def _normalization(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    mean_1C11 = torch.tensor(mean, dtype=torch.float64)[None, :, None, None] * 255
    scale_1C11 = 1 / (torch.tensor(std, dtype=torch.float64)[None, :, None, None] * 255)
    return mean_1C11.to(device, dtype), scale_1C11.to(device, dtype)
