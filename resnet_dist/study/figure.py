"""Figures. The only module that knows matplotlib, and never through pyplot: no state, no display, any thread.

Colours: one family of runs is orange, the next blue; those differ for every kind of colour vision, and in
print by the style of their lines.
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
LIGHTEST, DARKEST = 0.5, 0.95  # of a colour map: lighter than this a line is lost on white
INCHES = (13.0, 5.2)
DOTS_PER_INCH = 130
FEW_DECADES = 10**2.5  # up to here an axis has labels at 1, 2 and 5
TITLE_WIDTH, LONGEST_WORD = 100, 10  # letters


@dataclass(frozen=True)
class Curve:
    """One run: its training loss at steps, and the norms of its gradients by layer at some of them."""

    family: str
    shade: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    gradient_norms: dict[int, tuple[float, ...]]


@dataclass(frozen=True)
class Style:
    """How the repeats of one net are drawn."""

    label: str
    color: ColorType
    line: str


def draw_study(curves: Sequence[Curve], *, title: str) -> Figure:
    """Training loss against steps; the gradient of every layer early and late, where it was measured.

    Curves of one family and shade are repeats: the line is their mean, the band spans all of them.
    """
    groups = _groups(curves)
    moments = _measured_steps(curves)
    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    widths = (1.5, 1, 1) if moments else (1,)
    axes: list[Axes] = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    styles = _styles(groups)
    for key, repeats in groups.items():
        draw_losses(axes[0], repeats, styles[key])
    _finish(axes[0], "Training loss", "Optimizer steps", "Cross-entropy, nats")
    if moments:
        for panel, step, when in zip(axes[1:], (moments[0], moments[-1]), ("early", "late"), strict=True):
            for key, repeats in groups.items():
                draw_gradient_norms(panel, repeats, step, styles[key])
            name = f"Gradient by layer, {when}: step {step}"
            _finish(panel, name, "Convolution, from input to output", "L2 norm")
    figure.suptitle(_balanced(title), fontsize="large", fontweight="bold")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, title=_note(groups)
    )
    return figure


def draw_losses(axes: Axes, repeats: Sequence[Curve], style: Style) -> None:
    """One line with its band, over the steps that all repeats have."""
    steps = sorted(set.intersection(*(set(curve.steps) for curve in repeats)))
    by_step = [dict(zip(curve.steps, curve.losses, strict=True)) for curve in repeats]
    losses_RS = np.array([[losses[step] for step in steps] for losses in by_step])  # R repeats, S steps
    _line(axes, steps, losses_RS, style)


def draw_gradient_norms(axes: Axes, repeats: Sequence[Curve], step: int, style: Style) -> None:
    """One line with its band, over the layers from input to output."""
    norms_RL = np.array([curve.gradient_norms[step] for curve in repeats])  # R repeats, L layers
    _line(axes, range(1, norms_RL.shape[1] + 1), norms_RL, style)


def _measured_steps(curves: Sequence[Curve]) -> list[int]:
    """The steps at which every run has measured its gradients, in order."""
    return sorted(set.intersection(*(set(curve.gradient_norms) for curve in curves)))


def _line(axes: Axes, x: Iterable[int], values_RX: np.ndarray, style: Style) -> None:
    x = list(x)
    axes.plot(x, values_RX.mean(axis=0), style.line, color=style.color, label=style.label, linewidth=1.8)
    if len(values_RX) > 1:
        low, high = values_RX.min(axis=0), values_RX.max(axis=0)
        axes.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_yscale("log")
    low, high = axes.dataLim.intervaly
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > FEW_DECADES * low else (1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _groups(curves: Sequence[Curve]) -> dict[tuple[str, str], list[Curve]]:
    """Repeats by (family, shade): families in the order of their appearance, shades in their own."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((curve.family, curve.shade), []).append(curve)
    families = list(dict.fromkeys(curve.family for curve in curves))
    return dict(sorted(groups.items(), key=lambda item: (families.index(item[0][0]), _order(item[0][1]))))


def _styles(groups: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Style]:
    keys = list(groups)
    families = list(dict.fromkeys(family for family, _ in keys))
    shades = sorted({shade for _, shade in keys}, key=_order)
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


def _order(shade: str) -> tuple[float, str]:
    """Numbers by their value, before words."""
    try:
        return float(shade), ""
    except ValueError:
        return float("inf"), shade


def _balanced(title: str) -> str:
    """Broken into lines of about the same length."""
    lines = math.ceil(len(title) / TITLE_WIDTH)
    return "\n".join(textwrap.wrap(title, len(title) // lines + LONGEST_WORD))


def _note(groups: dict[tuple[str, str], list[Curve]]) -> str | None:
    """What line and band are, where there is a band."""
    counts = sorted({len(repeats) for repeats in groups.values()})
    if counts[-1] == 1:
        return None
    return f"line: mean of {' or '.join(map(str, counts))} runs; band: lowest to highest"
