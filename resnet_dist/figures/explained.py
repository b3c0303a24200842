"""Draw an image as a net sees it, a map of where the evidence for a class lies on it, and the most probable classes.

Shapes: S image size, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from resnet_dist.figures.drawing import COLORS, new_figure, png_of, short

HEAT = "inferno"  # from dark to light, also without colors
MAX_COVER = 0.65  # of the image, where the map is largest
SMALL = 96  # pixels: such an image is drawn as squares, larger ones smoothly


def draw_explained(
    image_SSC: NDArray[np.uint8],
    map_SS: NDArray[np.float32],
    shown: str,
    classes: Sequence[str],
    probabilities: Sequence[float],
) -> bytes:
    """Return a PNG. map: from 0 to 1, for the class `shown`. classes, probabilities: the best first."""
    figure = new_figure(9.5, 3.6, f"Evidence for {short(shown)}")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.05))
    pixels = image_SSC[:, :, 0] if image_SSC.shape[2] == 1 else image_SSC
    smooth = "nearest" if len(image_SSC) < SMALL else "bilinear"
    for axes, title in ((left, "the net's view"), (middle, "where the evidence is")):
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation=smooth)
        axes.set_title(title, fontsize="medium")
        axes.set_axis_off()
    heat = middle.imshow(
        map_SS, cmap=HEAT, vmin=0, vmax=1, alpha=MAX_COVER * map_SS, interpolation="bilinear"
    )
    if not map_SS.any():
        middle.set_title("no evidence for this class", fontsize="medium")
    heat.set_rasterized(True)
    places = range(len(classes))
    right.barh(places, probabilities, color=[COLORS[1] if name == shown else COLORS[0] for name in classes])
    right.set_yticks(places, [short(name) for name in classes])
    right.invert_yaxis()
    right.set_xlim(0, 1.25)
    right.set_xticks([])
    right.spines[["top", "right", "bottom"]].set_visible(False)
    for place, value in zip(places, probabilities, strict=True):
        right.text(value + 0.02, place, f"{value:.1%}", va="center", fontsize="small")
    right.set_title("probability", fontsize="medium")
    return png_of(figure)
