"""The figure of a study, read back from matplotlib's objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from resnet_dist.study.figure import Curve, draw_study

STEPS = (10, 20, 30)
DEPTHS = ("110", "20", "56")  # unsorted; the figure must sort them


def curve(family: str, shade: str, seed: int, **changes: object) -> Curve:
    level = (1 + seed) * int(shade) * (1 if family == "plain" else 0.01)
    fields = {
        "family": family,
        "shade": shade,
        "steps": STEPS,
        "losses": tuple(level / step for step in STEPS),
        "gradient_norms": {step: tuple(level + step + layer for layer in range(5)) for step in STEPS},
    }
    return Curve(**{**fields, **changes})  # type: ignore[arg-type]


CURVES = [
    curve(family, shade, seed) for seed in range(3) for family in ("plain", "residual") for shade in DEPTHS
]


def test_lines_are_means_and_bands_span_the_repeats() -> None:
    losses, early, late = draw_study(CURVES, title="t").axes
    labels = [f"{family}-{depth}" for family in ("plain", "residual") for depth in ("20", "56", "110")]
    for axes in (losses, early, late):
        assert [line.get_label() for line in axes.lines] == labels
        assert len(axes.collections) == len(labels)
        assert axes.get_yscale() == "log"
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    np.testing.assert_array_equal(losses.lines[0].get_xdata(), STEPS)
    np.testing.assert_allclose(losses.lines[0].get_ydata(), [2 * 20 / step for step in STEPS])
    corners = losses.collections[0].get_paths()[0].vertices
    for step in STEPS:
        heights = corners[corners[:, 0] == step][:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((20 / step, 60 / step))
    np.testing.assert_array_equal(early.lines[0].get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(early.lines[0].get_ydata(), [2 * 20 + 10 + layer for layer in range(5)])
    np.testing.assert_allclose(late.lines[0].get_ydata(), [2 * 20 + 30 + layer for layer in range(5)])
    assert "step 10" in early.get_title()
    assert "step 30" in late.get_title()


def test_every_line_lies_inside_its_panel() -> None:
    figure = draw_study(CURVES, title="t")
    figure.draw_without_rendering()
    for axes in figure.axes:
        low, high = axes.get_ylim()
        heights = np.concatenate([line.get_ydata() for line in axes.lines])
        assert low < heights.min()
        assert heights.max() < high


def test_families_differ_in_colour_and_shades_in_darkness_and_style() -> None:
    lines = draw_study(CURVES, title="t").axes[0].lines
    assert len({to_hex(line.get_color()) for line in lines}) == len(lines)
    for family in (lines[:3], lines[3:]):
        darkness = [sum(line.get_color()[:3]) for line in family]
        assert darkness == sorted(darkness, reverse=True)
        assert len({line.get_linestyle() for line in family}) == 3
    red, _, blue = (sum(line.get_color()[channel] for line in lines[:3]) for channel in range(3))
    assert red > 2 * blue


def test_title_and_legend_stand_outside_the_data() -> None:
    figure = draw_study(CURVES, title="Depth hurts " * 20)
    figure.draw_without_rendering()
    assert figure.get_suptitle().replace("\n", " ").strip() == ("Depth hurts " * 20).strip()
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "line: mean of 3 runs; band: lowest to highest"
    assert [text.get_text() for text in legend.get_texts()][:2] == ["plain-20", "plain-56"]
    around = [legend.get_window_extent(), figure._suptitle.get_window_extent()]
    for axes in figure.axes:
        assert not any(axes.get_window_extent().overlaps(box) for box in around)
        assert axes.get_legend() is None


def test_one_run_has_no_band() -> None:
    figure = draw_study(CURVES[:1], title="t")
    assert not figure.axes[0].collections
    assert figure.legends[0].get_title().get_text() == ""


def test_without_gradients_there_is_one_panel(tmp_path: Path) -> None:
    curves = [*CURVES, curve("plain", "20", 3, gradient_norms={})]
    figure = draw_study(curves, title="t")
    assert len(figure.axes) == 1
    assert figure.legends[0].get_title().get_text().startswith("line: mean of 3 or 4 runs")
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_repeats_logged_at_other_steps_meet_where_both_were() -> None:
    other = curve("plain", "20", 1, steps=(5, 10, 30), losses=(9.0, 3.0, 1.0))
    line = draw_study([curve("plain", "20", 0), other], title="t").axes[0].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), [10, 30])
    np.testing.assert_allclose(line.get_ydata(), [(2 + 3) / 2, (20 / 30 + 1) / 2])
