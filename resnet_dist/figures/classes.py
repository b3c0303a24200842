"""Draw the accuracy of the best and the worst classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from resnet_dist.figures.confusions import Counts
from resnet_dist.figures.drawing import COLORS, Drawn, new_figure, png_of, short

MAX_CLASSES = 20  # at each end


def draw_classes(counts: Counts, classes: Sequence[str]) -> Drawn:
    """Return the top-1 accuracy of the worst and the best classes; the file has all. counts: of all confusions."""
    rows = class_rows(counts, classes)
    measured = sorted((row for row in rows if row["samples"]), key=lambda row: row["top1"])
    worst = measured[:MAX_CLASSES]
    best = measured[len(worst) :][-MAX_CLASSES:][::-1]
    panels = [("Worst classes", worst, COLORS[1])] + ([("Best classes", best, COLORS[0])] if best else [])
    height = max(3.0, 0.24 * max(len(worst), len(best)) + 1.3)
    figure = new_figure(7.5 * len(panels), height, f"Top-1 accuracy of {len(measured):,} classes")
    for axes, (title, shown, color) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _draw(axes, title, shown, color)
    mean = float(np.mean([row["top1"] for row in measured])) if measured else 0.0
    return Drawn(png_of(figure), {"mean_of_classes": mean, "classes": rows})


def class_rows(counts: Counts, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return samples, accuracy (recall) and precision of each class; None where there is nothing to divide by."""
    hits, samples, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    return [
        {
            "class": name,
            "samples": int(samples[label]),
            "top1": float(hits[label] / samples[label]) if samples[label] else None,
            "precision": float(hits[label] / predicted[label]) if predicted[label] else None,
        }
        for label, name in enumerate(classes)
    ]


def _draw(axes: Axes, title: str, rows: Sequence[dict[str, Any]], color: str) -> None:
    axes.set_title(title, fontsize="medium")
    bars = axes.barh(range(len(rows)), [row["top1"] for row in rows], color=color)
    texts = [f"{row['top1']:.1%} of {row['samples']:,}" for row in rows]
    axes.bar_label(bars, texts, fontsize=8, padding=2)
    axes.set_yticks(range(len(rows)), [short(row["class"]) for row in rows], fontsize=8)
    axes.set_xlim(0, 1.25)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
