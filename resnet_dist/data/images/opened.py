"""An image whose header has been read, and the boxes that are asked of it.

The caller chooses a crop before anything is decoded. What it gets may already be shrunk, to at least the size it wants.

Shapes: pixels are uint8, H height, W width, C channels.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

MAX_SCALE = 8  # the strongest reduction that JPEG's inverse transform offers


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Image(Protocol):
    """An encoded image whose header has been read. Height and width are those that a viewer shows."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def min_scale(self) -> int:
        """The least reduction at which `pixels` decodes: 1, unless the image has more than `max_pixels`."""
        ...

    @property
    def plain_jpeg(self) -> bytes | None:
        """The bytes of an ordinary JPEG in color, from which another decoder can cut a box; None for all other images."""
        ...

    @property
    def held_bytes(self) -> int:
        """The memory that the image holds: encoded, or decoded already."""
        ...

    def prepare(self, box: Box, size: int) -> None:
        """Do what `pixels` of the same arguments does before it decodes: it is faster for many images in turn."""
        ...

    def pixels(self, box: Box, size: int) -> Pixels:
        """Return `box` as (H, W, C), to be resized to `size` x `size` by the caller.

        It is already shrunk by `scale_for`, where the box lies on the grid of that scale and the format allows it.
        The pixels are valid until this thread asks for those of the next image. Raises ValueError where the bytes
        cannot be decoded, or where an image of more than `max_pixels` had to be decoded at more than 1/`min_scale`.
        """
        ...


def scale_for(height: int, width: int, size: int) -> int:
    """Return the factor by which a crop may shrink while it is decoded and stay at least `size`: 1, 2, 4 or 8."""
    scale = 1
    while scale < MAX_SCALE and min(height, width) >= 2 * scale * size:
        scale *= 2
    return scale


def grid_scale(box: Box, size: int) -> int:
    """Return `scale_for` of a box where it lies on the grid of that scale, else 1."""
    scale = scale_for(box.height, box.width, size)
    return 1 if any(edge % scale for edge in box) else scale


def cut(pixels_HWC: Pixels, box: Box) -> Pixels:
    """Return a view of the pixels in a box: it is valid as long as they are."""
    return pixels_HWC[box.top : box.top + box.height, box.left : box.left + box.width]
