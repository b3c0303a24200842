"""The benches at sizes that take seconds: both sides do equal work, and both are measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.bench import step
from resnet_dist.bench.startup import STEP, StartFailed, bench_launch, reach
from resnet_dist.bench.step import Pace, bench_step
from resnet_dist.errors import UserError
from resnet_dist.world import World
from tests.paths import JOBS

TINY = {"model": "resnet8", "image_size": 8, "global_batch_size": 16, "steps": 4, "rounds": 2, "gpu": False}


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "sync_buffers"), [(1, True), (2, True), (2, False)])
def test_both_loops_do_the_same_work(ranks: int, sync_buffers: bool) -> None:
    speed = bench_step(**TINY, ranks=ranks, sync_buffers=sync_buffers)
    assert speed.our_loss == pytest.approx(speed.bare_loss, rel=1e-5)
    assert speed.same_work
    assert len(speed.ours) == len(speed.bare) == len(speed.ratios) == TINY["rounds"]
    assert min(speed.ours + speed.bare) > 0


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_both_loops_take_as_many_steps_in_every_round(steps: int, gpu: bool) -> None:
    pace, rounds = Pace.of(steps, gpu=gpu), 3
    ends = [step for step in range(1, pace.total(rounds)) if pace.ends_turn(step)]
    taken: dict[int, int] = {}
    for begin, end in pairwise([0, *ends]):
        taken[pace.round_of(end)] = taken.get(pace.round_of(end), 0) + end - begin
    assert taken == {0: steps + pace.first, 1: steps, 2: steps, 3: steps}
    logged = range(steps, pace.total(rounds) - 1, steps)
    assert all(min(end for end in ends if end > step) - step == (pace.first or steps) for step in logged)


def test_different_work_shows_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare loop ignores label smoothing. The one rank runs in this process, which has imported everything."""

    def run_here(main: Callable[..., Any], num_ranks: int, *arguments: Any, gpu: bool) -> list[Any]:
        assert num_ranks == 1
        return [main(World.single(gpu=gpu), *arguments)]

    monkeypatch.setattr(step, "run_ranks", run_here)
    speed = bench_step(**TINY, ranks=1, overrides=["train.label_smoothing=0.5"])
    assert not speed.same_work


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"ranks": 3},
            r"--ranks 3 cannot share --global-batch-size 16 evenly; use one of \[1, 2, 4, 8, 16\]",
        ),
        ({"ranks": 1, "model": "resnet9"}, "--model resnet9: use one of"),
        ({"ranks": 1, "overrides": ["train.precision=fp8"]}, "train.precision='fp8'"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_step(**(TINY | fields))  # type: ignore[arg-type]


@pytest.mark.long
def test_launch_times_both_programs() -> None:
    recipe = JOBS / "digits.py"
    speed = bench_launch(recipe, workers=1, local=True, gpu=False, rounds=1)
    assert len(speed.ours) == len(speed.minimal) == 1
    assert speed.minimal[0] > 0
    assert list(speed.parts) == ["imports, checks, MLflow", "ranks", STEP]
    assert min(speed.parts.values()) >= 0
    assert sum(speed.parts.values()) == pytest.approx(speed.ours[0])


def test_a_program_that_ends_early_is_reported_with_its_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    with pytest.raises(StartFailed, match=r"ended before its first step:\nno such thing"):
        reach(command, {STEP: (tmp_path / "never").exists}, tmp_path / "log")


def test_neither_program_is_started_through_uv(tmp_path: Path) -> None:
    """Ray's hook for `uv run` would package and install this folder for the workers of one of them."""
    program = "import os; print(os.environ['RAY_ENABLE_UV_RUN_RUNTIME_ENV'])"
    log = tmp_path / "log"
    reach([sys.executable, "-c", program], {STEP: lambda: log.read_text() == "0\n"}, log)
