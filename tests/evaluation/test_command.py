"""`evaluate` with its options: a folder of results, corruptions, the model's run in MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from resnet_dist.cli.models import evaluate
from resnet_dist.errors import UserError
from resnet_dist.evaluation import robust
from resnet_dist.evaluation.robust import Condition
from resnet_dist.launch.on_ray import pool
from resnet_dist.tracking.mlflow.page import evaluations
from resnet_dist.tracking.mlflow.page.evaluations import check_name
from tests.checkpoints import random_checkpoint
from tests.paths import ROOT
from tests.predict.conftest import Command


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("evaluated")
    return str(random_checkpoint(folder, "model.name=resnet8", classes=tuple("0123456789"))[0])


def test_a_folder_with_the_numbers_and_the_figures(
    command: Command, model: str, digits_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions = (Condition("contrast", 1), Condition("contrast", 5))
    monkeypatch.setattr(robust, "ALL_CONDITIONS", conditions)
    words = ("evaluate", model, digits_data / "eval", "--out", "result", "--robust")
    code, out, err = command(*words)
    assert (code, err) == (0, "")
    assert out.startswith("eval/loss     ")
    assert "eval/samples  360\n" in out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("contrast ")]
    assert out.endswith("written to result\n")
    assert "not ImageNet-C itself: 14 of its 15 corruptions" in out
    names = {path.name for path in (tmp_path / "result").iterdir()}
    assert {"evaluation.json", "confusions.png", "classes.json", "calibration.json"} <= names
    numbers = json.loads((tmp_path / "result/evaluation.json").read_text())
    assert (numbers["step"], numbers["precision"], numbers["bad"]) == (7, "fp32", [])
    assert numbers["metrics"]["samples"] == 360
    by_severity = numbers["top1_by_severity"]["contrast"]
    assert [f"{by_severity[key]:.2%}" for key in ("1", "5")] == row[1:3]
    assert f"{numbers['metrics']['robust/contrast']:.2%}" == row[3]
    assert command(*words)[::2] == (
        2,
        "error: --out result: exists already; give another name, or remove it\n",
    )
    assert {path.name for path in tmp_path.iterdir()} == {"result"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "fp16"], "--precision fp16 needs a GPU; use bf16 or fp32"),
        (["--out", "no/where"], "--out no/where: no such folder "),
        (["--log", "test"], "--log: "),
        (["--log", "perf"], "--log perf: the run has metrics perf/… of its training; use another name"),
    ],
)
def test_a_mistake_is_one_sentence(
    command: Command, model: str, digits_data: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    code, out, err = command("evaluate", model, digits_data / "eval", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "a b", "-x", "a/b", "eval"])
def test_a_name_that_metrics_cannot_have(name: str) -> None:
    with pytest.raises(UserError, match="--log"):
        check_name(name)


@pytest.mark.parametrize("order", [("reference", "whole"), ("whole", "reference")])
def test_of_two_models_of_a_step_the_one_with_its_weights_is_linked(
    order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [
        SimpleNamespace(model_id="reference", name="step-4"),
        SimpleNamespace(model_id="whole", name="model"),
    ]
    monkeypatch.setattr(evaluations, "models_of", lambda client, run_id: models)
    outputs = [SimpleNamespace(model_id=model_id, step=4) for model_id in order]
    run = SimpleNamespace(outputs=SimpleNamespace(model_outputs=outputs), info=SimpleNamespace(run_id="r"))
    assert evaluations._model_id(None, run, 4) == "whole"
    assert evaluations._model_id(None, run, 5) is None


class FakePool:
    """Workers in this process: they evaluate one after the other."""

    gpu = False

    def __init__(self) -> None:
        self.asked_to_count: list[bool] = []

    def map(
        self, function: Any, job: Any, parts: list[range], show: Callable[[int], None] | None
    ) -> list[Any]:
        self.asked_to_count.append(show is not None)
        done = [0] * len(parts)

        def counted(number: int, steps: int) -> None:
            done[number] = steps
            assert show is not None
            show(sum(done))

        count = [[] if show is None else [partial(counted, number)] for number in range(len(parts))]
        return [function(job, part, 1, *count[number]) for number, part in enumerate(parts)]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_workers_on_ray_move_the_bar_of_a_terminal(
    command: Command, model: str, digits_data: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    fake, shown = FakePool(), list[tuple[str, int, int | None]]()
    monkeypatch.setattr(pool, "worker_pool", lambda *_, **__: nullcontext(fake))
    monkeypatch.setattr(evaluate, "can_move", lambda console: is_terminal)
    monkeypatch.setattr(
        evaluate, "bars", lambda *_: nullcontext(lambda name, done, total: shown.append((name, done, total)))
    )
    overrides = ("evaluate", model, digits_data / "eval", "--workers", "2")
    code, out, err = command(*overrides)
    assert (code, "eval/samples  360\n" in out) == (0, True), err
    assert fake.asked_to_count == [is_terminal]
    numbers = [done for _, done, _ in shown]
    assert numbers == sorted(numbers)
    assert {(name, total) for name, _, total in shown} == ({("evaluate", 360)} if is_terminal else set())
    assert not is_terminal or 0 < numbers[-1] <= 360


@pytest.mark.long
def test_it_is_logged_to_the_run_and_linked_to_its_model(command: Command, tmp_path: Path) -> None:
    words = ("--set", "model.name=resnet8", "--set", "train.length=4 steps", "--local", "--name", "first")
    assert command("train", ROOT / "jobs/digits.py", *words)[0] == 0
    code, out, err = command("evaluate", "first", "output/data/digits/eval", "--log", "test")
    assert (code, err) == (0, "")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/output/mlflow.db")
    (run,) = client.search_runs(["1"])
    assert out.endswith(f"logged as test/… to run {run.info.run_id}, linked to its model\n")
    assert run.data.metrics["test/samples"] == 360
    # The same model by the same code: what training measured at that step.
    assert run.data.metrics["test/loss"] == run.data.metrics["eval/loss"]
    (point,) = client.get_metric_history(run.info.run_id, "test/top1")
    assert point.step == 4
    models = client.search_logged_models([run.info.experiment_id])
    (whole,) = (model for model in models if model.name == "model")  # the others refer to checkpoints
    linked = {metric.key for metric in whole.metrics}
    assert {"test/top1", "test/loss"} <= linked
    files = {file.path for file in client.list_artifacts(run.info.run_id, "evaluations/test")}
    assert {"evaluations/test/evaluation.json", "evaluations/test/confusions.png"} <= files
    by_id = ("evaluate", run.info.run_id, "output/data/digits/eval", "--log", "again")
    code, out, err = command(*by_id)
    assert (code, err) == (0, "")
    assert out.endswith("linked to its model\n")
