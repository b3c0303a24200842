"""Curves of block characters, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from resnet_dist.experiments.numbers import metric_text
from resnet_dist.tracking.logged_run import Point

BLOCKS, ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", "  ..::||#"
WIDTH, HEIGHT = 60, 6


def chart(name: str, points: Sequence[Point], *, plain: bool = False) -> list[str]:
    """Return the lines of a chart: the metric over the steps, with its range. plain: ASCII alone.

    A metric without finite values has one line that states it.
    """
    points = finite(points)
    if not points:
        return [f"{name}: no values"]
    low, high = limits([points])
    if len(points) == 1:
        return [f"{name}: {metric_text(name, points[0].value)} at step {points[0].step}"]
    heights = columns(points, WIDTH, (points[0].step, points[-1].step), (low, high))
    top, bottom = metric_text(name, high), metric_text(name, low)
    margin = max(len(top), len(bottom))
    rows = [bar_row(heights, row, plain=plain) for row in reversed(range(HEIGHT))]
    labels = [top, *[""] * (HEIGHT - 2), bottom]
    axis = f"{points[0].step:,}".ljust(WIDTH - len(f"{points[-1].step:,}")) + f"{points[-1].step:,}"
    return [
        f"{name}: {metric_text(name, points[-1].value)} at step {points[-1].step:,}",
        *(f"  {label:>{margin}} {row}".rstrip() for label, row in zip(labels, rows, strict=True)),
        f"  {'':{margin}} {axis}",
    ]


def sparkline(
    points: Sequence[Point], steps: tuple[int, int], values: tuple[float, float], *, plain: bool = False
) -> str:
    """Return a curve of one row. steps, values: the limits of both axes, which several curves may share."""
    points = finite(points)
    if not points:
        return ""
    heights = columns(points, WIDTH, steps, values)
    signs = ASCII_BLOCKS if plain else BLOCKS
    last = len(signs) - 1
    return "".join(" " if h is None else signs[1 + round(h * (last - 1))] for h in heights).rstrip()


def limits(curves: Sequence[Sequence[Point]]) -> tuple[float, float]:
    """Return the smallest and the largest value of all curves."""
    values = [point.value for points in curves for point in points]
    return min(values), max(values)


def finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.value)]


def columns(
    points: Sequence[Point], width: int, steps: tuple[int, int], values: tuple[float, float]
) -> list[float | None]:
    """Return the height of a curve in each column, from 0 to 1; None where the curve has not begun or has ended.

    A column with several points has their mean; one without any lies on the line between its neighbours.
    """
    (first, last), (low, high) = steps, values
    scale = (width - 1) / max(1, last - first)
    sums: dict[int, list[float]] = {}
    for point in points:
        sums.setdefault(round((point.step - first) * scale), []).append(point.value)
    known = {column: math.fsum(found) / len(found) for column, found in sums.items() if 0 <= column < width}
    places = sorted(known)
    heights: list[float | None] = [None] * width
    for left, right in zip(places, places[1:] or places, strict=False):
        for column in range(left, right + 1):
            share = (column - left) / max(1, right - left)
            value = known[left] + share * (known[right] - known[left])
            heights[column] = (value - low) / (high - low) if high > low else 0.5
    return heights


def bar_row(heights: Sequence[float | None], row: int, *, plain: bool) -> str:
    """Return one row of filled columns, row 0 at the bottom. A column is at least the lowest block high."""
    signs = ASCII_BLOCKS if plain else BLOCKS
    steps = len(signs) - 1

    def sign(height: float | None) -> str:
        if height is None:
            return " "
        filled = max(1, round(height * HEIGHT * steps)) - row * steps
        return signs[min(steps, max(0, filled))]

    return "".join(map(sign, heights))
