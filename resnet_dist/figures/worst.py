"""Draw the images that are most surely wrong, with class, prediction and probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resnet_dist.figures.drawing import Drawn, new_figure, png_of, short
from resnet_dist.train.predictions import Predictions

COLUMNS = 9
CELL = 1.25  # height of a row, in widths of an image: room for two lines of text
MIN_INCHES = 7.0  # room for the title


def draw_worst(found: Predictions, classes: Sequence[str], step: int) -> Drawn | None:
    """Return the grid of the worst images of an evaluation, the worst first; None where no sample is wrong."""
    count = len(found.worst_K)
    if not count:
        return None
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    title = f"Most surely wrong after step {step:,}: class → prediction"
    figure = new_figure(max(MIN_INCHES, 1.75 * columns), 1.75 * CELL * rows + 0.5, title)
    # One pair of axes for all: making a pair takes longer than drawing an image.
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_aspect("equal")
    data = worst_rows(found, classes)
    for number, (image, row) in enumerate(zip(found.images_KSSC, data, strict=True)):
        x, y = number % columns, CELL * (number // columns)
        pixels = image[:, :, 0] if image.shape[2] == 1 else image
        place = (x, x + 0.95, y + 0.95, y)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=place)
        text = f"{short(row['class'])} {row['class_probability']:.0%}\n→ {short(row['predicted'])} {row['probability']:.0%}"
        axes.text(x, y - 0.02, text, fontsize=7, va="bottom")
    axes.set_xlim(0, columns)
    axes.set_ylim(CELL * rows - (CELL - 1), 1 - CELL)
    return Drawn(png_of(figure), {"step": step, "samples": data})


def worst_rows(found: Predictions, classes: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "sample": int(found.ids_N[place]),
            "class": classes[found.labels_N[place]],
            "predicted": classes[found.predictions_N[place]],
            "class_probability": float(found.label_probabilities_N[place]),
            "probability": float(found.probabilities_N[place]),
        }
        for place in found.worst_K.tolist()
    ]
