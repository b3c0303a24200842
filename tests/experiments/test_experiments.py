"""The texts of `runs`: the best run first, what differs, and curves that keep their range."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.experiments import compare, curves, details, listing
from resnet_dist.experiments.numbers import duration_text, metric_text
from resnet_dist.tracking.logged_run import LoggedRun, Point, differing

PARAMS = {"name": "digits", "model.name": "resnet8", "optim.lr": "0.1", "description": "x"}


def run(name: str, top1: float | None, state: str = "FINISHED", **params: str) -> LoggedRun:
    metrics = {} if top1 is None else {"eval/top1": top1, "eval/loss": 0.5, "train/loss": 0.25}
    values = {**PARAMS, **{key.replace("__", "."): value for key, value in params.items()}}
    return LoggedRun(f"id-{name}", name, "digits", "1", state, 1000, 61_000, values, metrics)


def test_the_best_is_first_and_only_what_differs_is_shown() -> None:
    runs = [
        run("new", None, "RUNNING", optim__lr="0.3", description="other"),
        run("worse", 0.5),
        run("best", 0.75, optim__lr="0.2", model__name="resnet20"),
    ]
    lines = listing.table(runs)
    assert [line.split()[0] for line in lines] == ["RUN", "best", "worse", "new"]
    assert lines[0].split()[-2:] == ["NAME", "LR"]  # the fields that differ, without "model." and "optim."
    assert lines[1].split()[1:4] == ["FINISHED", "75.00%", "0.5000"]
    assert lines[3].split()[1:4] == ["RUNNING", "-", "-"]
    assert "description" not in differing(runs)
    # Another version of the package may have had fewer fields.
    assert differing([run("a", 1.0), run("b", 1.0, seed="0")]) == {}


def test_fields_without_a_column_are_counted() -> None:
    runs = [run("a", 0.5), run("b", 0.6, **{f"field{n}": "1" for n in range(9)})]
    runs[0] = run("a", 0.5, **{f"field{n}": "0" for n in range(9)})
    assert listing.table(runs)[-1] == "3 more fields differ; `resnet-dist runs compare` shows all"


def test_runs_side_by_side() -> None:
    runs = [run("a", 0.5), run("b", 0.75, optim__lr="0.2")]
    rows = {line.split()[0]: line.split()[1:] for line in compare.side_by_side(runs)[1:]}
    assert rows["optim.lr"] == ["0.1", "0.2"]
    assert rows["eval/top1"] == ["50.00%", "75.00%"]
    assert "model.name" not in rows
    assert compare.side_by_side([runs[0], runs[0]])[-1] == "their recipes differ in no field"
    assert compare.comparison_json(runs)["differs"] == {"optim.lr": ["0.1", "0.2"]}


def test_curves_of_several_runs_have_common_axes() -> None:
    long, short = [Point(0, 0.0), Point(100, 1.0)], [Point(0, 1.0), Point(50, 1.0)]
    lines = compare.curves(
        [run("a", 0.5), run("bb", 0.5)], {"train/loss": [long, short], "train/lr": [[], []]}, plain=False
    )
    assert lines[1] == "train/loss from 0.0000 to 1.0000, steps 0 to 100"
    assert lines[2].startswith("  a   ▁")
    assert lines[2].endswith("█")
    assert len(lines[3]) < len(lines[2])
    assert set(lines[3].split()[1]) == {"█"}
    assert len(lines) == 4  # A metric that no run has is left out.


def test_a_run_in_detail() -> None:
    tags = {
        "resnet_dist.folder": "/o/runs/a",
        "resnet_dist.key": "hidden",
        "resnet_dist.restart.2": "rank 1 was lost",
    }
    one = LoggedRun(
        "id", "a", "digits", "1", "KILLED", 0, 7_200_000, PARAMS, {"eval/top1": 0.5}, tags, "file:///o"
    )
    lines = details.describe(one, [one, run("b", 1.0, optim__lr="0.2")], "MLflow in /o/mlflow.db", "")
    text = "\n".join(lines)
    for part in (
        "a (id)",
        "KILLED, 2 h 00 min",
        "eval/top1 50.00%",
        "/o/runs/a",
        "optim.lr=0.1",
        "rank 1 was lost",
    ):
        assert part in text
    assert "hidden" not in text
    assert "page" not in text


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=200),
    st.booleans(),
)
def test_a_chart_has_its_size_and_its_range(values: list[float], plain: bool) -> None:
    points = [Point(10 * step, value) for step, value in enumerate(values)]
    lines = curves.chart("train/lr", points, plain=plain)
    assert len(lines) == curves.HEIGHT + 2
    assert max(map(len, lines[1:])) <= curves.WIDTH + 20
    assert lines[1].split()[0] == metric_text("train/lr", max(values))
    assert lines[curves.HEIGHT].split()[0] == metric_text("train/lr", min(values))
    assert not plain or "".join(lines).isascii()
    heights = curves.columns(points, curves.WIDTH, (0, points[-1].step), (min(values), max(values)))
    assert all(height is not None and -1e-9 <= height <= 1 + 1e-9 for height in heights)


def test_curves_without_a_shape() -> None:
    assert curves.chart("a", []) == ["a: no values"]
    assert curves.chart("a", [Point(1, math.nan)]) == ["a: no values"]
    assert curves.chart("eval/top1", [Point(3, 0.5)]) == ["eval/top1: 50.00% at step 3"]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("eval/top1", 0.98765, "98.77%"),
        ("train/loss", 1.5, "1.5000"),
        ("perf/images_per_second", 12345.6, "12,346"),
        ("train/lr", 0.000123, "0.000123"),
        ("x", None, "-"),
        ("x", math.inf, "inf"),
    ],
)
def test_metrics_in_words(name: str, value: float | None, text: str) -> None:
    assert metric_text(name, value) == text


def test_durations_in_words() -> None:
    assert [duration_text(s) for s in (None, 5.4, 600.0, 3600.0, 90_060.0)] == [
        "-",
        "5 s",
        "10 min",
        "1 h 00 min",
        "25 h 01 min",
    ]
