"""The first stage of one image: choose boxes, decode the part that holds them, resize each to a square.

Shapes: R views of an image (one for each copy of its sample), H height, W width, S size of a square, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from resnet_dist.config import Data
from resnet_dist.data.images.draws import Draws
from resnet_dist.data.images.opened import Box, Image, Pixels, scale_for
from resnet_dist.data.images.pixels import mirrored
from resnet_dist.data.images.view import is_whole, middle, on_grid, resize


def to_sizes(
    image: Image,
    data: Data,
    crops_R: Sequence[Draws | None],
    mirror_R: Sequence[bool],
    size: int,
    boxes_R: Sequence[Box] | None = None,
) -> list[Pixels]:
    """Decode an image once and return R views of it, each (size, size, C) uint8.

    crops_R: draws that choose a random box for each view; None takes the middle of the image. boxes_R: what `prepared`
    has returned for the same arguments.
    The pixels are valid until this thread asks for those of the next image. Raises ValueError where the image
    cannot be decoded.
    """
    single_middle = len(crops_R) == 1 and crops_R[0] is None and not any(mirror_R)
    if single_middle and is_whole(image, size, data.eval_crop):
        # Return early: the steps below would change nothing, and take as long as decoding a small image.
        return [image.pixels(Box(0, 0, size, size), size)]
    boxes = boxes_of(image, data, crops_R, size) if boxes_R is None else boxes_R
    views = [
        resize(pixels, size, size, resize_mode(data, draws))
        for pixels, draws in zip(cut(image, boxes, size), crops_R, strict=True)
    ]
    return [
        mirrored(torch.from_numpy(pixels[None]))[0].numpy() if mirror else pixels
        for pixels, mirror in zip(views, mirror_R, strict=True)
    ]


def prepared(image: Image, data: Data, crops_R: Sequence[Draws | None], size: int) -> list[Box] | None:
    """Choose the boxes of an image's views, and do what precedes its decoding; None where there is nothing to do.

    A decoding takes all of the processor's cache. So this takes a third of the time where it is done for several images
    in turn, before any of them is decoded.
    """
    if crops_R[0] is None:
        return None
    boxes = boxes_of(image, data, crops_R, size)
    image.prepare(*_around(boxes, size))
    return boxes


def boxes_of(image: Image, data: Data, crops_R: Sequence[Draws | None], size: int) -> list[Box]:
    """Return the box of each view of an image: random by its draws, or the middle without."""
    return [
        middle(image.height, image.width, size, data.eval_crop)
        if draws is None
        else random_box(image.height, image.width, size, draws)
        for draws in crops_R
    ]


def resize_mode(data: Data, draws: Draws | None) -> str:
    """Return the interpolation of a view: of a random box, or without draws of the middle."""
    if draws is None:
        return data.eval_resize
    if data.resize != "random":
        return data.resize
    # Take the last bit of a draw that chooses the box, on which the box hardly depends.
    return "bicubic" if int(draws[0] * 2**32) % 2 else "bilinear"


def cut(image: Image, boxes: Sequence[Box], size: int) -> list[Pixels]:
    """Return the pixels of boxes that will be resized to `size`, after one decoding of the part that holds them."""
    around, decoded_size = _around(boxes, size)
    pixels = image.pixels(around, decoded_size)
    if len(boxes) == 1:
        return [pixels]
    # Measure the scale instead of assuming it: not every format can be decoded at one.
    scale = around.height // pixels.shape[0]
    return [
        pixels[(box.top - around.top) // scale :, (box.left - around.left) // scale :][
            : box.height // scale, : box.width // scale
        ]
        for box in boxes
    ]


def _around(boxes: Sequence[Box], size: int) -> tuple[Box, int]:
    """Return the box around all boxes, and the size for which it must be decoded, if each will be resized to `size`."""
    if len(boxes) == 1:
        return boxes[0], size
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.top + box.height for box in boxes), max(box.left + box.width for box in boxes)
    around = Box(top, left, bottom - top, right - left)
    # Shrink as far as every box allows: a box that lies on the grid of its own scale lies on any finer grid.
    scale = min(scale_for(box.height, box.width, size) for box in boxes)
    return around, min(around.height, around.width) // scale


def random_box(height: int, width: int, size: int, draws: Draws) -> Box:
    """Choose a box of 8 to 100 % of the area, between 3:4 and 4:3 in shape: Inception's crop (arXiv 1409.4842).

    draws: four for each try. A box at least twice as large as `size` is laid on the grid on which JPEGs are decoded
    at a smaller scale.
    """
    return on_grid(_any_box(height, width, draws), size)


def _any_box(height: int, width: int, draws: Draws) -> Box:
    for first in range(0, len(draws), 4):  # The first try nearly always fits.
        area_draw, ratio_draw, top_draw, left_draw = draws[first : first + 4].tolist()
        area = height * width * (0.08 + 0.92 * area_draw)
        ratio = math.exp(math.log(3 / 4) + ratio_draw * 2 * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w)
    # No try fitted: take the largest legal box, in the middle, as torchvision does.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return Box((height - h) // 2, (width - w) // 2, max(1, h), max(1, w))
