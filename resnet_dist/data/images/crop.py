"""TODO map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from resnet_dist.config import Data
from resnet_dist.data.images.decode import Box, Image, Pixels, scale_for, whole
from resnet_dist.data.images.pixels import Draws, mirrored, resize

CROP_TRIES = 10  # as torchvision's RandomResizedCrop


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
