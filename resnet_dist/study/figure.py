"""Draw the figure of a study. The only module that imports matplotlib.

It never uses pyplot, so it keeps no global state, needs no display and works in any thread.

Colours: the first family of runs is orange, the next blue. They differ for every kind of colour vision;
without colours, in print, the lines differ by their style.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.typing import ColorType

FAMILY_COLORS = ("Oranges", "Blues", "Greens", "Purples")
LINE_STYLES = ("--", "-", "-.", ":")
LIGHTEST, DARKEST = 0.5, 0.95  # positions in a colour map; a lighter line would be lost on white
INCHES = (13.0, 5.2)
DOTS_PER_INCH = 130
# An axis whose ends have at most this ratio has labels at 1, 2 and 5 of each decade; a longer one at 1 alone.
MAX_DENSE_RATIO = 10**2.5
MAX_LINE_LETTERS, MAX_WORD_LETTERS = 100, 10  # the longest line and word of the title


@dataclass(frozen=True)
class Curve:
    """One run: its training loss, and the norms of its gradients."""

    family: str
    shade: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]  # nats, one for each of `steps`
    gradient_norms: dict[int, tuple[float, ...]]  # by step, then by layer from input to output


@dataclass(frozen=True)
class Style:
    """The label, colour and line style of one group of repeats."""

    label: str
    color: ColorType
    line: str


def draw_study(curves: Sequence[Curve], *, title: str) -> Figure:
    """Draw the training loss over steps, and every layer's gradient early and late where it was measured.

    Curves of the same family and shade are repeats: a line is their mean, a band spans all of them.
    """
    groups = _groups(curves)
    moments = _measured_steps(curves)
    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    widths = (1.5, 1, 1) if moments else (1,)
    axes: list[Axes] = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    styles = _styles(groups)
    for key, repeats in groups.items():
        draw_losses(axes[0], repeats, styles[key])
    _label_axes(axes[0], "Training loss", "Optimizer steps", "Cross-entropy, nats")
    if moments:
        for panel, step, when in zip(axes[1:], (moments[0], moments[-1]), ("early", "late"), strict=True):
            for key, repeats in groups.items():
                draw_gradient_norms(panel, repeats, step, styles[key])
            name = f"Gradient by layer, {when}: step {step}"
            _label_axes(panel, name, "Convolution, from input to output", "L2 norm")
    figure.suptitle(_wrap_evenly(title), fontsize="large", fontweight="bold")
    handles, labels = axes[0].get_legend_handles_labels()
    meaning = _legend_title(groups)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, title=meaning
    )
    return figure


def draw_losses(axes: Axes, repeats: Sequence[Curve], style: Style) -> None:
    """Draw one line with its band over the steps that all repeats have."""
    steps = sorted(set.intersection(*(set(curve.steps) for curve in repeats)))
    by_step = [dict(zip(curve.steps, curve.losses, strict=True)) for curve in repeats]
    losses_RS = np.array([[losses[step] for step in steps] for losses in by_step])  # R repeats, S steps
    _line(axes, steps, losses_RS, style)


def draw_gradient_norms(axes: Axes, repeats: Sequence[Curve], step: int, style: Style) -> None:
    """Draw one line with its band over the layers, from input to output."""
    norms_RL = np.array([curve.gradient_norms[step] for curve in repeats])  # R repeats, L layers
    _line(axes, range(1, norms_RL.shape[1] + 1), norms_RL, style)


def _measured_steps(curves: Sequence[Curve]) -> list[int]:
    """Return the steps at which every run has measured its gradients, in order."""
    return sorted(set.intersection(*(set(curve.gradient_norms) for curve in curves)))


def _line(axes: Axes, x: Iterable[int], values_RX: np.ndarray, style: Style) -> None:
    x = list(x)
    axes.plot(x, values_RX.mean(axis=0), style.line, color=style.color, label=style.label, linewidth=1.8)
    if len(values_RX) > 1:
        low, high = values_RX.min(axis=0), values_RX.max(axis=0)
        axes.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)


def _label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_yscale("log")
    low, high = axes.dataLim.intervaly
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > MAX_DENSE_RATIO * low else (1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _groups(curves: Sequence[Curve]) -> dict[tuple[str, str], list[Curve]]:
    """Return the repeats by (family, shade): families in order of appearance, shades sorted."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((curve.family, curve.shade), []).append(curve)
    families = list(dict.fromkeys(curve.family for curve in curves))
    return dict(sorted(groups.items(), key=lambda item: (families.index(item[0][0]), _sort_key(item[0][1]))))


def _styles(groups: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Style]:
    keys = list(groups)
    families = list(dict.fromkeys(family for family, _ in keys))
    shades = sorted({shade for _, shade in keys}, key=_sort_key)
    darkness = np.linspace(LIGHTEST, DARKEST, len(shades)) if len(shades) > 1 else [DARKEST]
    return {
        (family, shade): Style(
            label=f"{family}-{shade}",
            color=matplotlib.colormaps[FAMILY_COLORS[families.index(family) % len(FAMILY_COLORS)]](
                float(darkness[shades.index(shade)])
            ),
            line=LINE_STYLES[shades.index(shade) % len(LINE_STYLES)],
        )
        for family, shade in keys
    }


def _sort_key(shade: str) -> tuple[float, str]:
    """Return a key that sorts numbers by value, before text."""
    try:
        return float(shade), ""
    except ValueError:
        return float("inf"), shade


def _wrap_evenly(title: str) -> str:
    """Break `title` into lines of about the same length."""
    lines = math.ceil(len(title) / MAX_LINE_LETTERS)
    return "\n".join(textwrap.wrap(title, len(title) // lines + MAX_WORD_LETTERS))


def _legend_title(groups: dict[tuple[str, str], list[Curve]]) -> str | None:
    """Return the meaning of line and band; None where no group has a band."""
    counts = sorted({len(repeats) for repeats in groups.values()})
    if counts[-1] == 1:
        return None
    return f"line: mean of {' or '.join(map(str, counts))} runs; band: lowest to highest"
