"""Per-sample transforms: pixels of any size → pixels of the recipe's size, drawn from the sample's identity.

`to_size` crops and resizes one image while it is decoded; `augmented` does the rest with a batch of images that
have the recipe's size already, on the CPU or on a GPU, and so serves the caches too.

Shapes: N images, H height, W width, C channels, S the image size that the model sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from resnet_dist.config import Data
from resnet_dist.data.decode import Box, Image, Pixels, scale_for
from resnet_dist.data.philox import Purpose, uniform, words_of
from resnet_dist.data.policy import jitter_color, rand_augment, trivial_augment

CROP_TRIES = 10  # as torchvision's RandomResizedCrop

Draws = NDArray[np.float64]


@dataclass(frozen=True)
class Randomness:
    """Uniform draws from [0, 1) for every sample of a batch; what a recipe does not use has no columns."""

    batch_N4: Draws  # flip, shift down, shift right, erase
    crop_NK: Draws
    policy_NK: Draws
    color_N4: Draws
    erase_N4: Draws

    def rows(self, rows: slice) -> Randomness:
        return Randomness(
            self.batch_N4[rows],
            self.crop_NK[rows],
            self.policy_NK[rows],
            self.color_N4[rows],
            self.erase_N4[rows],
        )


def randomness(ids: NDArray[np.int64], data: Data, *, seed: int, epoch: int) -> Randomness:
    """From (seed, epoch, sample id) alone: the same on any rank, and after any restart."""

    def draw(purpose: Purpose, blocks: int) -> Draws:
        if blocks == 0:
            return np.empty((len(ids), 0))
        return uniform(words_of(ids, purpose, seed=seed, epoch=epoch, blocks=blocks))

    policies = {"none": 0, "rand-augment": data.policy_ops, "trivial-augment": 1}
    return Randomness(
        draw(Purpose.AUGMENT, 1),
        draw(Purpose.CROP, CROP_TRIES if data.crop == "random-resized-crop" else 0),
        draw(Purpose.POLICY, policies[data.policy]),
        draw(Purpose.COLOR, 1 if data.color_jitter else 0),
        draw(Purpose.ERASE, 1 if data.erase else 0),
    )


def to_size(image: Image, data: Data, crop_draws: Draws | None, *, mirror: bool = False) -> Pixels:
    """First stage, one image: (S, S, C). `crop_draws` choose a random box; None takes the middle.

    Raises ValueError where the image cannot be decoded.
    """
    size = data.image_size
    if crop_draws is None:
        box = middle(image.height, image.width, size, data.eval_crop)
    else:
        box = random_box(image.height, image.width, size, crop_draws)
    pixels = resize(image.pixels(box, size), size, size)
    return mirrored(torch.from_numpy(pixels[None]))[0].numpy() if mirror else pixels


def mirrors(data: Data, random: Randomness) -> list[bool]:
    """Which images `to_size` is to mirror: of random crops, while they are in the processor's cache."""
    chosen: list[bool] = (random.batch_N4[:, 0] < 0.5).tolist()
    return chosen if data.flip and data.crop == "random-resized-crop" else [False] * len(chosen)


def augmented(
    source_NSSC: Tensor, rows_B: NDArray[np.int64], data: Data, random: Randomness | None
) -> Tensor:
    """Images `rows_B` of `source`, with all that comes after the crop: a new tensor, on the source's device.

    `random` has a row for each; None only takes them.
    """
    pad = data.pad if data.crop == "pad-crop" else 0
    if random is None or pad == 0 or recolors(data):
        source_NSSC = take(source_NSSC, rows_B)
        rows_B = np.arange(len(rows_B))
        if random is None:
            return source_NSSC
    return augment_(source_NSSC, rows_B, data, random)


def augment_(images_NSSC: Tensor, rows_B: NDArray[np.int64], data: Data, random: Randomness) -> Tensor:
    """As `augmented`; perhaps in place, where `rows_B` are all rows in their order."""
    if recolors(data):
        for row, pixels_SSC in enumerate(images_NSSC.numpy()):
            pixels_SSC[:] = recolored(pixels_SSC, data, random, row)
    if data.crop == "pad-crop" and data.pad:  # taking and shifting images is one copy on a CPU
        down_B, right_B = (random.batch_N4[:, 1:3] * (2 * data.pad + 1)).astype(np.int64).T - data.pad
        images_NSSC = shifted(images_NSSC, rows_B, down_B, right_B)
    if data.flip and data.crop != "random-resized-crop":
        flip_(images_NSSC, random.batch_N4[:, 0] < 0.5)
    if data.erase:
        chosen_B = random.batch_N4[:, 3] < data.erase
        images_NSSC = erased(images_NSSC, chosen_B, random.erase_N4, data.mean)
    return images_NSSC


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


def shifted(
    source_NSSC: Tensor, rows_B: NDArray[np.int64], down_B: NDArray[np.int64], right_B: NDArray[np.int64]
) -> Tensor:
    """Images `rows_B`, seen through a window that is moved down and right; black where it leaves the image."""
    size = source_NSSC.shape[1]
    down_BS, right_BS = down_B[:, None] + np.arange(size), right_B[:, None] + np.arange(size)
    if source_NSSC.device.type == "cpu":
        out = _rows_at(source_NSSC.numpy(), rows_B[:, None] * size + down_BS, right_B)
    else:
        down, right = (torch.from_numpy(moved).to(source_NSSC.device) for moved in (down_BS, right_BS))
        out = pixels_at(source_NSSC, rows_B, down, right)
    for moved_BS, view in ((down_BS, out), (right_BS, out.transpose(1, 2))):
        outside = np.nonzero((moved_BS < 0) | (moved_BS >= size))
        if len(outside[0]):
            view[tuple(torch.from_numpy(i).to(out.device) for i in outside)] = 0
    return out


def pixels_at(source_NSSC: Tensor, rows_B: NDArray[np.int64], down_BS: Tensor, right_BS: Tensor) -> Tensor:
    """Of images `rows_B`, the pixels at these rows and columns, the nearest where there are none: (B, S, S, C)."""
    size = source_NSSC.shape[1]
    first_B1 = torch.from_numpy(rows_B).to(source_NSSC.device)[:, None] * size
    rows_BS = first_B1 + down_BS.clamp(0, size - 1)
    return source_NSSC.flatten(0, 2)[rows_BS[:, :, None] * size + right_BS.clamp(0, size - 1)[:, None, :]]


def _rows_at(pixels_NSSC: Pixels, rows_BS: NDArray[np.int64], right_B: NDArray[np.int64]) -> Tensor:
    """A copy for each row of pixels, not one for each pixel: rows of all images, moved by `right`."""
    n, size, _, channels = pixels_NSSC.shape
    # A row is one item of size * channels bytes; one begins at every pixel, so they overlap.
    row = np.dtype((np.void, size * channels))
    all_rows = np.ndarray(((n * size - 1) * size + 1,), row, pixels_NSSC, 0, (channels,))
    first_BS = rows_BS * size + right_B[:, None]
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
        images_NSSC[torch.from_numpy(rows).to(images_NSSC.device)] = images


def mirrored(images_NSSC: Tensor) -> Tensor:
    # Seen as N C S S with channels last in memory, which has a vectorised mirror.
    return images_NSSC.permute(0, 3, 1, 2).flip(-1).permute(0, 2, 3, 1)


def take(source_NSSC: Tensor, rows_B: NDArray[np.int64]) -> Tensor:
    """A copy of some images. On a CPU by NumPy, which copies whole images and so several times faster."""
    if source_NSSC.device.type == "cpu":
        return torch.from_numpy(source_NSSC.numpy()[rows_B])
    return source_NSSC.index_select(0, torch.from_numpy(rows_B).to(source_NSSC.device))


def erased(
    images_NSSC: Tensor, chosen_N: NDArray[np.bool], draws_N4: Draws, mean: tuple[float, ...]
) -> Tensor:
    """A rectangle of 2 to 33 % of the area and 0.3 to 3.3 in shape painted over (arXiv 1708.04896)."""
    size, device = images_NSSC.shape[1], images_NSSC.device
    area, ratio = size * size * (0.02 + 0.31 * draws_N4[:, 0]), 0.3 * (3.3 / 0.3) ** draws_N4[:, 1]
    high = np.clip(np.sqrt(area / ratio).round(), 1, size) * chosen_N
    broad = np.clip(np.sqrt(area * ratio).round(), 1, size) * chosen_N
    top, left = np.floor(draws_N4[:, 2] * (size - high + 1)), np.floor(draws_N4[:, 3] * (size - broad + 1))
    edges_4N = torch.from_numpy(np.stack([top, top + high, left, left + broad])).to(device)
    at_S = torch.arange(size, device=device)
    down_NS = (at_S >= edges_4N[0][:, None]) & (at_S < edges_4N[1][:, None])
    right_NS = (at_S >= edges_4N[2][:, None]) & (at_S < edges_4N[3][:, None])
    paint = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8, device=device)
    return torch.where((down_NS[:, :, None] & right_NS[:, None, :])[..., None], paint, images_NSSC)


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
