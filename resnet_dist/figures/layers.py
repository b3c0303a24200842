"""Draw the gradient of each layer over the steps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import LogNorm

from resnet_dist.figures.drawing import Drawn, new_figure, png_of, short

MAX_STEPS, MAX_NAMES = 400, 60  # columns, and names of layers, that are drawn


def draw_layers(norms: Mapping[int, Mapping[str, float]]) -> Drawn | None:
    """Return the norms by step and layer as a map; None where there are none. Their file is that of the run."""
    if not norms:
        return None
    steps = sorted(norms)[:: -(-len(norms) // MAX_STEPS)]
    layers = list(norms[steps[0]])
    values = np.array([[norms[step].get(layer, np.nan) for step in steps] for layer in layers])
    values[~(values > 0)] = np.nan  # A logarithm has no place for zero.
    figure = new_figure(12, min(14.0, 2.0 + 0.16 * len(layers)), "L2 norm of the gradient of each layer")
    axes = figure.subplots()
    if np.isfinite(values).any():
        norm = LogNorm(float(np.nanmin(values)), float(np.nanmax(values)) * (1 + 1e-9))
        image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", norm=norm)
        figure.colorbar(image, ax=axes)
    every = -(-len(layers) // MAX_NAMES)
    axes.set_yticks(range(0, len(layers), every), [short(name) for name in layers[::every]], fontsize=7)
    places = np.unique(np.linspace(0, len(steps) - 1, min(10, len(steps))).round().astype(int))
    axes.set_xticks(places, [f"{steps[place]:,}" for place in places])
    axes.set_xlabel("step")
    return Drawn(png_of(figure), {})
