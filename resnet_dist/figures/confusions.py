"""Draw which classes are taken for which: counts, and shares of each class.

Many classes are drawn as groups of neighbours, since nobody reads a thousand rows; the pairs that are confused most are
named beside them, in whatever groups they are.

Shapes: C classes, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from resnet_dist.figures.drawing import Drawn, new_figure, png_of, short

MAX_ROWS = 40  # of the matrix that is drawn
MAX_NUMBERS = 15  # rows up to which the numbers are written into it
MAX_PAIRS = 20
MAX_DENSE = 100  # classes up to which the file has the whole matrix

Counts = NDArray[np.int64]


def confusion_counts(labels: NDArray[np.int32], predictions: NDArray[np.int32], num_classes: int) -> Counts:
    """Return (C, C): samples by class and predicted class."""
    cells = labels.astype(np.int64) * num_classes + predictions
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def draw_confusions(counts: Counts, classes: Sequence[str]) -> Drawn:
    """Return the matrices of counts and of shares, and the pairs that are confused most."""
    groups = groups_of(len(classes))
    names = [_group_name(group, classes) for group in groups]
    edges = [group.start for group in groups]
    counts_GG = np.add.reduceat(np.add.reduceat(counts, edges, axis=0), edges, axis=1)
    pairs = confused_pairs(counts, classes)
    kind = f" in {len(groups)} groups of neighbours" if len(groups) < len(classes) else ""
    figure = new_figure(19, 6.6, f"Confusions of {len(classes):,} classes{kind}")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.75))
    shares_GG = counts_GG / np.maximum(counts_GG.sum(axis=1, keepdims=True), 1)
    _draw_matrix(left, counts_GG, names, "Samples", "{:,.0f}")
    _draw_matrix(middle, shares_GG, names, "Share of the samples of a row", "{:.2f}")
    _draw_pairs(right, pairs)
    return Drawn(png_of(figure), {"classes": list(classes), **_numbers(counts), "most_confused": pairs})


def groups_of(num_classes: int) -> list[range]:
    """Return the classes of each row of the drawn matrix: one, or neighbours in groups of about the same size."""
    rows = min(MAX_ROWS, num_classes)
    edges = [number * num_classes // rows for number in range(rows + 1)]
    return [range(low, high) for low, high in zip(edges, edges[1:], strict=False)]


def confused_pairs(counts: Counts, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the pairs of a class and another one that it is taken for, the most samples first."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    # A stable order, so that ties come out alike everywhere.
    cells = np.argsort(-wrong, axis=None, kind="stable")[:MAX_PAIRS]
    found = zip(*np.unravel_index(cells, wrong.shape), strict=True)
    samples = counts.sum(axis=1)
    return [
        {
            "class": classes[row],
            "predicted": classes[column],
            "samples": int(wrong[row, column]),
            "share": float(wrong[row, column] / samples[row]),
        }
        for row, column in found
        if wrong[row, column]
    ]


def _numbers(counts: Counts) -> dict[str, Any]:
    if len(counts) <= MAX_DENSE:
        return {"counts": counts.tolist()}
    rows, columns = counts.nonzero()
    cells = zip(rows.tolist(), columns.tolist(), counts[rows, columns].tolist(), strict=True)
    return {"cells": [list(cell) for cell in cells], "cell": ["class", "predicted class", "samples"]}


def _group_name(group: range, classes: Sequence[str]) -> str:
    first = short(classes[group.start])
    return first if len(group) == 1 else f"{group.start}-{group[-1]} {first}…"


def _draw_matrix(axes: Axes, values: NDArray[Any], names: Sequence[str], title: str, form: str) -> None:
    # The diagonal is far above all others: a square root makes single confusions visible.
    axes.imshow(np.sqrt(values), cmap="Blues", interpolation="nearest", aspect="equal")
    axes.set_title(title, fontsize="medium")
    places, size = range(len(names)), 9 if len(names) <= MAX_NUMBERS else 6
    axes.set_xticks(places, names, rotation=90, fontsize=size)
    axes.set_yticks(places, names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("class")
    if len(names) > MAX_NUMBERS:
        return
    half = np.sqrt(values.max()) / 2
    for row, column in np.argwhere(values > 0):
        color = "white" if np.sqrt(values[row, column]) > half else "black"
        text = form.format(values[row, column])
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)


def _draw_pairs(axes: Axes, pairs: Sequence[dict[str, Any]]) -> None:
    axes.set_title("Confused most: samples, share of the class", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    if not pairs:
        axes.text(0.5, 0.5, "no sample is wrong", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    counts = [pair["samples"] for pair in pairs]
    bars = axes.barh(range(len(pairs)), counts, color="#e07b00")
    axes.bar_label(
        bars, [f"{pair['samples']:,}, {pair['share']:.0%}" for pair in pairs], fontsize=8, padding=2
    )
    names = [f"{short(pair['class'])} → {short(pair['predicted'])}" for pair in pairs]
    axes.set_yticks(range(len(pairs)), names, fontsize=8)
    axes.set_xlim(0, max(counts) * 1.25)
    axes.invert_yaxis()
