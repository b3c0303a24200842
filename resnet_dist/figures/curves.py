"""Draw loss, accuracy, learning rate and speed over the steps."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from resnet_dist.figures.drawing import COLORS, Drawn, label_axes, new_figure, png_of

Series = Mapping[int, float]  # values by step
MAX_POINTS = 2000  # of a curve in the file of its numbers; the tracker has all of them
# For each panel: title, label of its values, metrics with their labels, and whether its axis is logarithmic.
PANELS = (
    ("Loss", "nats", {"train/loss": "training", "eval/loss": "evaluation"}, True),
    (
        "Accuracy",
        "share of samples",
        {"train/top1": "training top-1", "eval/top1": "evaluation top-1", "eval/top5": "evaluation top-5"},
        False,
    ),
    ("Learning rate", "", {"train/lr": ""}, False),
    ("Speed", "images/s", {"perf/images_per_second": ""}, False),
    (
        "A step",
        "seconds",
        {
            "perf/step_seconds": "step",
            "perf/compute_seconds": "computing",
            "perf/rank_wait_seconds": "waiting for ranks",
        },
        False,
    ),
    ("Waiting for data", "share of the time", {"perf/data_wait_fraction": ""}, False),
)
COLUMNS = 3


def draw_curves(metrics: Mapping[str, Series]) -> Drawn | None:
    """Return the curves of a run; None where no metric of them was recorded."""
    panels = [panel for panel in PANELS if any(metrics.get(name) for name in panel[2])]
    if not panels:
        return None
    rows = -(-len(panels) // COLUMNS)
    figure = new_figure(4.6 * COLUMNS, 3.3 * rows + 0.4, "Training")
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    data: dict[str, dict[str, list[float]]] = {}
    for panel, (title, unit, names, is_log) in zip(axes, panels, strict=False):
        label_axes(panel, title, "step", unit)
        for color, (name, label) in zip(COLORS, names.items(), strict=False):
            if series := metrics.get(name):
                _draw(panel, series, label, color)
                data[name] = _numbers(series)
        if is_log:
            panel.set_yscale("log", nonpositive="mask")
        if panel.get_legend_handles_labels()[1]:
            panel.legend(frameon=False, fontsize="small")
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    return Drawn(png_of(figure), data)


def _draw(axes: Axes, series: Series, label: str, color: str) -> None:
    steps = sorted(series)
    marker = "o" if len(steps) < 20 else ""
    values = [series[step] for step in steps]
    axes.plot(steps, values, color=color, label=label or None, linewidth=1.6, marker=marker, markersize=3)


def _numbers(series: Series) -> dict[str, list[float]]:
    steps = sorted(series)
    every = -(-len(steps) // MAX_POINTS)
    # The last step counts most.
    kept = sorted({*steps[::every], steps[-1]})
    return {"step": [float(step) for step in kept], "value": [series[step] for step in kept]}
