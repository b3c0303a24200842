"""A profile has the steps that were asked for, and changes nothing of the training."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest

from resnet_dist.cli.main import run_command
from resnet_dist.config import ProfiledSteps, Recipe
from resnet_dist.driver.request import Request
from resnet_dist.driver.run import run_training
from resnet_dist.errors import StorageError, UserError
from resnet_dist.launch.attempt import Attempt
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.open import open_publisher
from resnet_dist.train import loop
from resnet_dist.train.loop import train
from resnet_dist.train.parts import profiled
from resnet_dist.train.step.train_step import TrainStep
from resnet_dist.train.tracker import NullTracker
from resnet_dist.world import World
from tests.reporter import RecordingReporter
from tests.train.runs import Recorder, assert_same


class NoPermit:
    """A Permit of a run that another driver has taken over."""

    decides = True

    def check(self, recent_seconds: float = 0.0) -> None:
        raise StorageError("another driver trains this run")


@pytest.fixture
def recipe(digits_recipe: Recipe) -> Recipe:
    return digits_recipe.with_overrides(["train.length=6 steps", "train.log_every=1 steps"])


def steps_in(file: Path) -> list[str]:
    """Return the names of the steps in a trace, and of the batches that were waited for."""
    with gzip.open(file) as opened:
        events: list[dict[str, Any]] = json.load(opened)["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    return sorted(name for name in names if "step" in name and "#" not in name)


def test_the_training_is_the_same_and_the_trace_has_the_steps(recipe: Recipe, tmp_path: Path) -> None:
    plain, traced = Recorder(), Recorder()
    train(recipe, tmp_path / "plain", World.single(), plain)
    train(recipe, tmp_path / "traced", World.single(), traced, profile=ProfiledSteps(3, 4))
    assert_same(tmp_path / "plain", tmp_path / "traced")
    assert traced.curve == plain.curve
    assert not (tmp_path / "plain/profile").exists()
    trace, table = sorted((tmp_path / "traced/profile").iterdir())
    assert (trace.name, table.name) == ("steps-3-4.json.gz", "steps-3-4.txt")
    assert steps_in(trace) == ["batch of step 3", "batch of step 4", "step 3", "step 4"]
    assert "convolution" in table.read_text()


def test_without_a_profile_the_loop_has_the_loader_and_the_step_themselves(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[Any] = []
    around = loop.profiled

    @contextmanager
    def look(attempt: AbstractContextManager[Any], *arguments: Any) -> Iterator[Any]:
        with attempt as made, around(nullcontext(made), *arguments) as passed:
            parts.extend([made, passed])
            yield passed

    monkeypatch.setattr(loop, "profiled", look)
    short = recipe.with_overrides(["train.length=1 steps"])
    train(short, tmp_path, World.single(), NullTracker())
    made, passed = parts
    assert passed is made
    assert isinstance(made.train_step, TrainStep)
    other, steps = replace(World.single(), rank=1), ProfiledSteps(1, 2)
    with profiled(nullcontext(made), steps, tmp_path, other, NullTracker(), NoPermit()) as same:
        assert same is made


def test_a_run_that_is_stopped_before_the_last_of_them_has_the_others(recipe: Recipe, tmp_path: Path) -> None:
    calls = iter(range(1, 100))
    train(
        recipe,
        tmp_path,
        World.single(),
        NullTracker(),
        lambda: next(calls) == 2,
        profile=ProfiledSteps(2, 9),
    )
    (trace,) = (tmp_path / "profile").glob("*.json.gz")
    assert trace.name == "steps-2-2.json.gz"
    assert steps_in(trace) == ["batch of step 2", "step 2"]


def test_one_that_cannot_be_written_is_reported_and_the_run_finishes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()

    def full(*arguments: object) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr("resnet_dist.runs.storage.folder.write_bytes_atomically", full)
    outcome = train(recipe, tmp_path, World.single(), recorder, profile=ProfiledSteps(2, 3))
    assert outcome.finished
    assert recorder.notes[-1] == "the profile of steps 2:3 was not written: StorageError: no space left"


def test_the_driver_sends_it_with_the_results(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    request = Request(recipe, "x.py", tmp_path, local=True, name="x", profile=ProfiledSteps(2, 2))
    ended = run_training(request, RecordingReporter(), open_publisher).run
    assert ended.unsent == ()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    files = {file.path for file in client.list_artifacts(str(ended.run_id), "profile")}
    assert files == {"profile/steps-2-2.json.gz", "profile/steps-2-2.txt"}


def test_the_orders_of_a_rank_name_the_steps(digits_recipe: Recipe, tmp_path: Path) -> None:
    folder = RunFolder(open_storage(tmp_path), "x", None, 1, {})
    assert Attempt.of(digits_recipe, folder, cpus=1).profiled is None
    folder = replace(folder, profile=ProfiledSteps(10, 20))
    assert Attempt.of(digits_recipe, folder, cpus=1).profiled == ProfiledSteps(10, 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (text, "use two steps, the first from 1, such as 10:20")
            for text in ("5", "a:b", "0:3", "9:3", "1:-2", ":")
        ),
        ("1:101", "a trace has at most 100 steps, such as 1:10"),
    ],
)
def test_what_is_no_range_of_steps(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=f"--profile {text!r}: {message}"):
        ProfiledSteps.parse(text)
    monkeypatch.setattr("sys.argv", ["resnet-dist", "train", "jobs/digits.py", f"--profile={text}"])
    assert run_command() == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_steps_that_a_run_does_not_take(digits_recipe: Recipe) -> None:
    ProfiledSteps(3, 6).check(6, 4, "x")
    with pytest.raises(UserError, match="--profile 3:7: the run has 6 steps; name steps up to that"):
        ProfiledSteps(3, 7).check(6, 0, "x")
    with pytest.raises(UserError, match="--profile 3:6: run x continues after step 6; name steps after it"):
        ProfiledSteps(3, 6).check(9, 6, "x")
