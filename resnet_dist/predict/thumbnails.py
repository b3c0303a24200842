"""Small pictures as text, for the table on a terminal: half blocks, each of which shows two pixels in 24-bit colors.

Shapes: S image size, C channels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data.images.view import resize

LINES = 4  # of text, each with two rows of pixels
SIDE = 2 * LINES  # pixels, and characters of a line
BLOCK = "▀"  # Its upper half has the color of the text, its lower half that of the background.


def thumbnail(pixels_SSC: NDArray[np.uint8]) -> tuple[str, ...]:
    """Return the lines of a picture."""
    small = np.array(resize(pixels_SSC, SIDE, SIDE))
    colors = np.repeat(small, 3, axis=2) if small.shape[2] == 1 else small
    return tuple(
        "".join(
            f"\x1b[38;2;{';'.join(map(str, upper))};48;2;{';'.join(map(str, lower))}m{BLOCK}"
            for upper, lower in zip(colors[row].tolist(), colors[row + 1].tolist(), strict=True)
        )
        + "\x1b[0m"
        for row in range(0, SIDE, 2)
    )
