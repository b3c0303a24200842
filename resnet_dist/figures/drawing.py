"""Size, axes and file format of all figures. It never uses pyplot, so it needs no display and works in any thread."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOTS_PER_INCH = 100
# They differ for every kind of colour vision: blue, orange, green, grey.
COLORS = ("#1f6fb4", "#e07b00", "#2a8c55", "#777777")
MAX_LETTERS = 24  # of the name of a class


@dataclass(frozen=True)
class Drawn:
    """A figure as an image, and its numbers, ready for JSON."""

    png: bytes
    data: dict[str, Any]


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty figure of this size in inches."""
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    figure.suptitle(title, fontsize="large", fontweight="bold")
    return figure


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def short(name: str) -> str:
    """Return the name of a class, cut where it is long; a $ would begin a formula."""
    name = name.replace("$", r"\$")
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 1]}…"
