"""The augmentations after the first stage (crop.py), for a batch of images that have one size already.

They work on the CPU and on a GPU, and so serve both caches of decoded images. Random numbers come from draws.py.

Shapes: N images, B rows of a batch, H height, W width, S size of a square, C channels.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.config import Data
from resnet_dist.data.images import view
from resnet_dist.data.images.draws import Randomness
from resnet_dist.data.images.opened import Pixels
from resnet_dist.data.images.pixels import erased, flip_, reflected_windows, resize_batch, take, windows
from resnet_dist.data.images.policy.apply import jitter_color, rand_augment, trivial_augment


def augmented(
    source_NSSC: Tensor, rows_B: NDArray[np.int64], data: Data, random: Randomness | None, size: int
) -> Tensor:
    """Return images `rows_B` of `source_NSSC`, augmented: a new tensor (B, size, size, C) on the same device.

    random: a row for each image. None: copy the images without augmentation, at the size they have.
    """
    # Copy the images first, unless `windows` is the first operation on them: it makes a copy itself.
    if random is None or recolors(data) or not moves(data, source_NSSC.shape[1], size):
        source_NSSC = take(source_NSSC, rows_B)
        rows_B = np.arange(len(rows_B))
        if random is None:
            return source_NSSC
    return augment_(source_NSSC, rows_B, data, random, size)


def augment_(
    images_NSSC: Tensor, rows_B: NDArray[np.int64], data: Data, random: Randomness, size: int
) -> Tensor:
    """Return images `rows_B`, augmented, (B, size, size, C); the argument may be overwritten.

    Only `windows` selects rows: where it is not used, `rows_B` must be all rows in their order.
    """
    wide = images_NSSC.shape[1]
    if recolors(data):
        for row, pixels_SSC in enumerate(images_NSSC.numpy()):
            pixels_SSC[:] = recolored(pixels_SSC, data, random, row)
    if moves(data, wide, size):
        num_places = wide + 2 * data.pad - size + 1  # places of the window along an axis of the padded image
        down_B, right_B = (random.batch_N4[:, 1:3] * num_places).astype(np.int64).T - data.pad
        view_of = reflected_windows if data.pad_fill == "reflect" else windows
        images_NSSC = view_of(images_NSSC, rows_B, down_B, right_B, size)
    elif wide != size:
        images_NSSC = resize_batch(images_NSSC, size)
    # Skip random resized crops: `to_sizes` has mirrored them while they were in the processor's cache.
    if data.flip and data.crop != "random-resized-crop":
        flip_(images_NSSC, random.flip_N)
    if data.erase:
        chosen_B = random.batch_N4[:, 3] < data.erase
        images_NSSC = erased(images_NSSC, chosen_B, random.erase_N4, data.mean)
    return images_NSSC


def moves(data: Data, wide: int, size: int) -> bool:
    """Report whether images of size `wide` are seen through a window of `size` that has more than one place."""
    return data.crop == "pad-crop" and (data.pad > 0 or size != wide)


def recolors(data: Data) -> bool:
    """Report whether `recolored` changes anything."""
    return data.policy != "none" or data.color_jitter > 0


def recolored(pixels_SSC: Pixels, data: Data, random: Randomness, row: int) -> Pixels:
    """Apply the policy and the color jitter to one image, by the draws of a row."""
    if data.policy == "rand-augment":
        pixels_SSC = rand_augment(pixels_SSC, random.policy_NK[row].reshape(-1, 4), data)
    if data.policy == "trivial-augment":
        pixels_SSC = trivial_augment(pixels_SSC, random.policy_NK[row], data)
    if data.color_jitter:
        pixels_SSC = jitter_color(pixels_SSC, random.color_N4[row], strength=data.color_jitter)
    return pixels_SSC


def normalize(images_NHWC: Tensor, data: Data, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uint8 (N, H, W, C) as (N, C, H, W) of zero mean and unit variance, see view.py."""
    return view.normalize(images_NHWC, data.mean, data.std, dtype)
