"""The figure of a sweep, read back from matplotlib's objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from resnet_dist.sweep.figure import draw_sweep, scale_of, wrapped
from resnet_dist.sweep.plan import Outcome, Plan, PlannedTrial
from resnet_dist.sweep.search import Search

SEARCHES = (
    Search("optim.lr", "log", 0.01, 1.0),
    Search("seed", "int", 1, 3),
    Search("model.name", "list", choices=("resnet8", "resnet20", "resnet32")),
)
OUTCOMES = (
    Outcome("finished", 0.5, 24),
    Outcome("finished", 0.9, 24),
    Outcome("stopped", 0.2, 6),
    Outcome("diverged"),
    Outcome("finished", 0.7, 24),
    None,
)


def plan(outcomes: tuple[Outcome | None, ...] = OUTCOMES, metric: str = "eval/top1") -> Plan:
    trials = [
        PlannedTrial(
            f"s-{n}", (f"optim.lr={0.01 * 2**n:g}", f"seed={1 + n % 3}", "model.name=resnet20"), outcome
        )
        for n, outcome in enumerate(outcomes)
    ]
    return Plan((), 0, metric, {}, tuple(trials))


def test_every_trial_is_a_line_through_its_values() -> None:
    left, right, _ = draw_sweep(plan(), SEARCHES, title="t").axes
    lines = [line for line in left.lines if line.get_marker() == "o"]
    assert len(lines) == 5
    widest = max(lines, key=lambda line: line.get_linewidth())
    # The best: lr of 0.02 is log10(2)/2 of the way, seed 2 the middle, resnet20 the middle, its result the top.
    np.testing.assert_allclose(widest.get_ydata(), [np.log10(2) / 2, 0.5, 0.5, 1.0])
    assert sorted(len(line.get_ydata()) for line in lines) == [3, 4, 4, 4, 4]  # One has no result.
    assert {line.get_linestyle() for line in lines} == {"-", "--", ":"}
    steps = next(line for line in right.lines)
    np.testing.assert_array_equal(steps.get_xdata(), [1, 2, 5, 6])
    np.testing.assert_array_equal(steps.get_ydata(), [0.5, 0.9, 0.9, 0.9])
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["finished", "stopped", "diverged"]


def test_a_loss_is_best_where_it_is_lowest() -> None:
    left, right, _ = draw_sweep(plan(metric="eval/loss"), SEARCHES, title="t").axes
    widest = max(left.lines, key=lambda line: line.get_linewidth())
    assert widest.get_ydata()[-1] == pytest.approx((0.5 - 0.2) / 0.7)
    np.testing.assert_array_equal(right.lines[0].get_ydata(), [0.5, 0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    "outcomes",
    [
        (Outcome("finished", 0.5),),
        (Outcome("diverged"),),
        (Outcome("finished", 0.5), Outcome("stopped", 0.5)),
    ],
)
def test_few_or_equal_results_can_be_drawn(outcomes: tuple[Outcome | None, ...], tmp_path: Path) -> None:
    draw_sweep(plan(outcomes), SEARCHES, title="a $ b").savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_marks_can_be_read() -> None:
    names = [[text for _, text in scale_of(search, []).marks] for search in SEARCHES]
    assert names == [["0.01", "0.1", "1"], ["1", "2", "3"], ["resnet8", "resnet20", "resnet32"]]
    assert [text for _, text in scale_of(Search("x", "log", 0.009, 1.1), []).marks] == ["0.009", "0.1", "1.1"]
    assert [text for _, text in scale_of(Search("x", "uniform", 0.5, 0.9), []).marks][::2] == [
        "0.5",
        "0.7",
        "0.9",
    ]


def test_a_long_title_has_several_lines() -> None:
    lines = wrapped("word " * 60).split("\n")
    assert len(lines) == 3
    assert max(map(len, lines)) <= 110
