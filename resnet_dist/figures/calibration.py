"""Draw how often a prediction of some probability is right, with the expected calibration error (arXiv 1706.04599)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet_dist.figures.drawing import COLORS, Drawn, label_axes, new_figure, png_of

NUM_BINS = 15  # as in the paper


def draw_calibration(probabilities: NDArray[np.float32], is_right: NDArray[np.bool_]) -> Drawn:
    """Return the reliability diagram of the probabilities of N predicted classes."""
    data = calibration(probabilities, is_right)
    figure = new_figure(11, 4.6, f"Calibration: expected error {data['ece']:.2%}")
    left, right = figure.subplots(1, 2)
    edges = np.linspace(0, 1, NUM_BINS + 1)
    places, width = (edges[1:] + edges[:-1]) / 2, 1 / NUM_BINS
    accuracies = [value if value is not None else 0.0 for value in data["accuracy"]]
    left.bar(places, accuracies, width * 0.92, color=COLORS[0], label="right")
    left.plot([0, 1], [0, 1], "--", color=COLORS[3], label="calibrated")
    label_axes(left, "Predictions that are right", "probability of the prediction", "share of the samples")
    left.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.98))
    left.set_ylim(0, 1.2)
    right.bar(places, data["samples"], width * 0.92, color=COLORS[1])
    right.set_yscale("symlog", linthresh=1)
    label_axes(right, "Samples", "probability of the prediction", "samples")
    return Drawn(png_of(figure), data)


def calibration(probabilities: NDArray[np.float32], is_right: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the expected calibration error, and samples, accuracy and mean probability of each bin.

    A bin includes its upper edge. The error is the mean over the samples of |accuracy - mean probability| of their bin.
    """
    bins = np.clip(np.ceil(probabilities.astype(np.float64) * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    samples = np.bincount(bins, minlength=NUM_BINS)
    right = np.bincount(bins, weights=is_right, minlength=NUM_BINS)
    total = np.bincount(bins, weights=probabilities, minlength=NUM_BINS)
    divisor = np.maximum(samples, 1)
    known = samples > 0
    return {
        "ece": float(np.abs(right - total).sum() / max(1, samples.sum())),
        "bins": NUM_BINS,
        "samples": samples.tolist(),
        "accuracy": [float(v) if k else None for v, k in zip(right / divisor, known, strict=True)],
        "probability": [float(v) if k else None for v, k in zip(total / divisor, known, strict=True)],
    }
