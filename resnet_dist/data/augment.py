"""Per-sample transforms: pixels of any size → pixels of the step's size, drawn from the sample's identity.

`to_sizes` crops and resizes one image while it is decoded; `augmented` does the rest with a batch of images that
have one size already, on the CPU or on a GPU, and so serves the caches too.

Shapes: N images, R copies of one, H height, W width, C channels, S the image size that the model sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.config import Data
from resnet_dist.data.decode import Box, Image, Pixels, scale_for, whole
from resnet_dist.data.philox import Purpose, uniform, words_of
from resnet_dist.data.pixels import Draws, erased, flip_, mirrored, resize, resize_batch, take, windows
from resnet_dist.data.policy import jitter_color, rand_augment, trivial_augment

CROP_TRIES = 10  # as torchvision's RandomResizedCrop


@dataclass(frozen=True)
class Randomness:
    """Uniform draws from [0, 1) for every sample of a batch; what a recipe does not use has no columns."""

    batch_N4: Draws  # flip, shift down, shift right, erase
    flip_N: NDArray[np.bool]  # whether it is mirrored
    crop_NK: Draws
    policy_NK: Draws
    color_N4: Draws
    erase_N4: Draws

    def rows(self, rows: slice | NDArray[np.int64]) -> Randomness:
        return Randomness(*(getattr(self, field.name)[rows] for field in fields(self)))


def randomness(
    ids_N: NDArray[np.int64],
    data: Data,
    *,
    seed: int,
    epoch: int,
    copies_N: NDArray[np.int64] | None = None,
) -> Randomness:
    """From (seed, epoch, sample id, copy) alone: the same on any rank, and after any restart.

    `copies_N` says which of its `data.repeats` copies each is; None: all are the first.
    """
    if copies_N is None:
        copies_N = np.zeros(len(ids_N), np.int64)

    def draw(purpose: Purpose, blocks: int) -> Draws:
        if blocks == 0:
            return np.empty((len(ids_N), 0))
        return uniform(words_of(ids_N, purpose, seed=seed, epoch=epoch, sub=copies_N, blocks=blocks))

    policies = {"none": 0, "rand-augment": data.policy_ops, "trivial-augment": 1}
    batch_N4 = draw(Purpose.AUGMENT, 1)
    if data.flip == "alternate":
        times_seen_N = epoch * data.repeats + copies_N
        first_N = words_of(ids_N, Purpose.FLIP, seed=seed, epoch=0)[:, 0] & 1
        flip_N = (first_N + times_seen_N) % 2 == 1
    else:
        flip_N = (batch_N4[:, 0] < 0.5) & data.flip
    return Randomness(
        batch_N4,
        flip_N,
        draw(Purpose.CROP, CROP_TRIES if data.crop == "random-resized-crop" else 0),
        draw(Purpose.POLICY, policies[data.policy]),
        draw(Purpose.COLOR, 1 if data.color_jitter else 0),
        draw(Purpose.ERASE, 1 if data.erase else 0),
    )


def to_size(
    image: Image, data: Data, crop_draws: Draws | None, *, size: int | None = None, mirror: bool = False
) -> Pixels:
    """`to_sizes` of one view of an image: (S, S, C)."""
    return to_sizes(image, data, [crop_draws], [mirror], size or data.image_size)[0]


def to_sizes(
    image: Image, data: Data, crops_R: Sequence[Draws | None], mirror_R: Sequence[bool], size: int
) -> list[Pixels]:
    """First stage, one image, decoded once: R views of it, each (S, S, C).

    The draws of a view choose a random box; None takes the middle. The pixels are good until this thread asks for
    the next image's. Raises ValueError where the image cannot be decoded.
    """
    if (
        len(crops_R) == 1
        and crops_R[0] is None
        and not any(mirror_R)
        and data.eval_crop == 1
        and image.height == image.width == size
    ):
        return [
            whole(image)
        ]  # nothing to cut or to resize: looking for it would take as long as a small image
    boxes = [
        middle(image.height, image.width, size, data.eval_crop)
        if draws is None
        else random_box(image.height, image.width, size, draws)
        for draws in crops_R
    ]
    views = [resize(pixels, size, size) for pixels in cut(image, boxes, size)]
    return [
        mirrored(torch.from_numpy(pixels[None]))[0].numpy() if mirror else pixels
        for pixels, mirror in zip(views, mirror_R, strict=True)
    ]


def cut(image: Image, boxes: Sequence[Box], size: int) -> list[Pixels]:
    """The pixels of boxes which will be resized to `size`, after one decoding of the part that holds them all."""
    if len(boxes) == 1:
        return [image.pixels(boxes[0], size)]
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.top + box.height for box in boxes), max(box.left + box.width for box in boxes)
    around = Box(top, left, bottom - top, right - left)
    # As much shrinking as every box allows. Each lies on the grid of its own scale, and so on any finer one.
    scale = min(scale_for(box.height, box.width, size) for box in boxes)
    pixels = image.pixels(around, min(around.height, around.width) // scale)
    done = around.height // pixels.shape[0]  # not every format can be decoded at a scale
    return [
        pixels[(box.top - top) // done :, (box.left - left) // done :][
            : box.height // done, : box.width // done
        ]
        for box in boxes
    ]


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


def random_box(height: int, width: int, size: int, draws: Draws) -> Box:
    """A box of 8 to 100 % of the area and 3:4 to 4:3 in shape, as Inception's (arXiv 1409.4842) crop.

    A box at least twice as large as `size` is laid on the grid on which JPEGs are decoded at a smaller scale.
    """
    return on_grid(_any_box(height, width, draws.reshape(-1, 4)), size)


def on_grid(box: Box, size: int) -> Box:
    """`box`, moved and shrunk by less than the scale at which it will be decoded."""
    scale = scale_for(box.height, box.width, size)
    return box if scale == 1 else Box(*(edge // scale * scale for edge in box))


def _any_box(height: int, width: int, tries: Draws) -> Box:
    for area_draw, ratio_draw, top_draw, left_draw in tries.tolist():
        area = height * width * (0.08 + 0.92 * area_draw)
        ratio = math.exp(math.log(3 / 4) + ratio_draw * 2 * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w)
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # the largest legal middle
    return Box((height - h) // 2, (width - w) // 2, max(1, h), max(1, w))


def middle(height: int, width: int, size: int, share: float) -> Box:
    """The square in the middle, of `share` of the short side."""
    side = max(1, round(min(height, width) * share))
    return on_grid(Box((height - side) // 2, (width - side) // 2, side, side), size)


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
