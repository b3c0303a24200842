"""Draw the figure of a sweep: its trials as lines through the values that they had, and the best result so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resnet_dist.figures.drawing import label_axes, new_figure, short
from resnet_dist.sweep.plan import Plan, PlannedTrial
from resnet_dist.sweep.search import Search

WIDTH_OF_AXIS, MIN_WIDTH, HEIGHT = 1.7, 11.0, 5.0  # inches
MARGIN = 0.06  # of an axis, beyond its ends
MAX_TITLE = 110  # letters of a line
COLORS = "viridis"
STYLES = {"finished": "-", "stopped": "--", "diverged": ":", "failed": ":", "interrupted": ":"}
GREY = "#999999"
NUM_TICKS = 5
CLEAR = 1.5  # ratio of two marks on a logarithmic axis that can be read


@dataclass(frozen=True)
class Scale:
    """One vertical axis: where a value lies on it, from 0 at its bottom to 1, and its marks."""

    name: str
    marks: tuple[tuple[float, str], ...]
    places: dict[str, float]  # of the values that trials have


def draw_sweep(plan: Plan, searches: Sequence[Search], *, title: str) -> Figure:
    """Draw the trials of a plan that have ended."""
    trials = [trial for trial in plan.trials if trial.outcome is not None]
    width = max(MIN_WIDTH, WIDTH_OF_AXIS * (len(searches) + 1) + 4.5)
    figure = new_figure(width, HEIGHT, wrapped(title))
    left, right = figure.subplots(1, 2, width_ratios=(len(searches) + 1.5, 2))
    values = [trial.outcome.value for trial in trials if trial.outcome and trial.outcome.value is not None]
    norm = Normalize(min(values, default=0.0), max(values, default=1.0))
    draw_parallel(left, plan, trials, [scale_of(search, trials) for search in searches], norm)
    draw_progress(right, plan, trials, norm)
    return figure


def draw_parallel(
    axes: Axes, plan: Plan, trials: Sequence[PlannedTrial], scales: Sequence[Scale], norm: Normalize
) -> None:
    """Draw a line for each trial over the axes of the fields and of the result, the best ones on top."""
    colors = matplotlib.colormaps[COLORS if plan.mode == "max" else f"{COLORS}_r"]
    best, span = plan.best(), (norm.vmax or 0) - (norm.vmin or 0)
    sign = 1 if plan.mode == "max" else -1
    for trial in sorted(trials, key=lambda trial: _sort_key(trial, sign)):
        assert trial.outcome is not None
        heights = [scale.places[trial.values[scale.name]] for scale in scales]
        value = trial.outcome.value
        if value is not None:
            heights.append((value - (norm.vmin or 0)) / span if span else 0.5)
        axes.plot(
            range(len(heights)),
            heights,
            STYLES[trial.outcome.state],
            color=GREY if value is None else colors(norm(value)),
            linewidth=3.0 if trial is best else 1.4,
            marker="o",
            markersize=4,
        )
    result = Scale(plan.metric, _marks(norm.vmin or 0.0, norm.vmax or 0.0), {})
    for number, scale in enumerate([*scales, result]):
        _draw_axis(axes, number, scale)
    axes.set_xlim(-0.3, len(scales) + 0.6)
    axes.set_ylim(-MARGIN, 1 + MARGIN)
    axes.set_xticks(range(len(scales) + 1), [scale.name for scale in [*scales, result]])
    axes.tick_params(length=0, labelsize="medium")
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title("Values of the trials", fontsize="medium")
    handles = [
        axes.plot([], [], style, color="black", label=state)[0]
        for state, style in STYLES.items()
        if any(trial.outcome and trial.outcome.state == state for trial in trials)
    ]
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(handles), frameon=False
    )


def draw_progress(axes: Axes, plan: Plan, trials: Sequence[PlannedTrial], norm: Normalize) -> None:
    """Draw the result of each trial, by its number, and the best of those that were trained to their end so far."""
    colors = matplotlib.colormaps[COLORS if plan.mode == "max" else f"{COLORS}_r"]
    choose = max if plan.mode == "max" else min
    best: list[tuple[int, float]] = []
    for number, trial in enumerate(plan.trials, start=1):
        value = trial.outcome.value if trial.outcome is not None else None
        if trial.outcome is None or value is None:
            continue
        is_whole = trial.outcome.state == "finished"
        face = colors(norm(value)) if is_whole else "white"
        axes.scatter([number], [value], color=[face], edgecolors=[colors(norm(value))], zorder=3)
        if is_whole:
            best.append((number, choose(value, best[-1][1]) if best else value))
    if best:
        numbers, values = zip(*best, strict=True)
        axes.step([*numbers, len(plan.trials)], [*values, values[-1]], where="post", color="black", zorder=2)
    label_axes(axes, "Best so far (open: not trained to the end)", "Trial", plan.metric)
    axes.set_xlim(0.5, len(plan.trials) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    mappable = ScalarMappable(norm, colors)
    assert axes.figure is not None
    axes.figure.colorbar(mappable, ax=axes, label=plan.metric, shrink=0.8)


def scale_of(search: Search, trials: Sequence[PlannedTrial]) -> Scale:
    """Return the axis of a field: of a list its values, of a range both ends and numbers between them."""
    values = [trial.values[search.field] for trial in trials]
    if search.form == "list":
        step = 1 / (len(search.choices) - 1)
        places = {choice: number * step for number, choice in enumerate(search.choices)}
        return Scale(search.field, tuple((place, short(name)) for name, place in places.items()), places)
    is_log = search.form == "log"
    low, high = (math.log(search.low), math.log(search.high)) if is_log else (search.low, search.high)

    def place(value: float) -> float:
        return ((math.log(value) if is_log else value) - low) / (high - low)

    marks = tuple((place(number), f"{number:.3g}") for number in _round_numbers(search))
    return Scale(search.field, marks, {value: place(float(value)) for value in values})


def _round_numbers(search: Search) -> list[float]:
    """Return the numbers that are written beside the axis of a range: both ends, and some between them."""
    low, high = search.low, search.high
    if search.form == "log":
        decades = [
            10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        ]
        # A decade beside an end would be written over it.
        between = [decade for decade in decades if CLEAR * low < decade < high / CLEAR]
        return [low, *between, high]
    if search.form == "int" and high - low < NUM_TICKS:
        return [low + number for number in range(int(high - low) + 1)]
    return [low + (high - low) * number / (NUM_TICKS - 1) for number in range(NUM_TICKS)]


def wrapped(title: str) -> str:
    """Break a long title into lines; a $ would begin a formula."""
    words, lines = title.replace("$", r"\$").split(" "), [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) >= MAX_TITLE:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _marks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    if low == high:
        return ((0.5, f"{low:.4g}"),)
    places = [number / (NUM_TICKS - 1) for number in range(NUM_TICKS)]
    return tuple((place, f"{low + (high - low) * place:.4g}") for place in places)


def _draw_axis(axes: Axes, number: int, scale: Scale) -> None:
    axes.plot([number, number], [-MARGIN / 2, 1 + MARGIN / 2], color="black", linewidth=1, zorder=0)
    for place, text in scale.marks:
        axes.annotate(
            text,
            (number, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5},
            zorder=4,
        )


def _sort_key(trial: PlannedTrial, sign: int) -> float:
    """Return a key that puts the best trial last, and those without a result first."""
    value = trial.outcome.value if trial.outcome is not None else None
    return -math.inf if value is None else sign * value
