"""Studies: their runs and their conclusions, and that no run is trained twice."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest

from resnet_dist import Recipe, RecipeError, Result, Study, Trial
from resnet_dist.config import load_study
from resnet_dist.driver.request import Interrupted, Reporter, Request
from resnet_dist.errors import UserError
from resnet_dist.model import build_model, count_parameters
from resnet_dist.runs.choose import choose_run
from resnet_dist.runs.evaluation_results import Evaluated, EvaluationResults
from resnet_dist.runs.folder import RUNS_FOLDER, read_run
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.study.report import metrics_by_step, report, summarise
from resnet_dist.study.request import StudyRequest
from resnet_dist.study.run import StudyInterrupted, run_study
from resnet_dist.tracking.open import open_group, open_publisher
from resnet_dist.tracking.spool import Entry, Follower, Spool
from resnet_dist.train import loop
from resnet_dist.train.checkpoint.folder import list_checkpoints
from tests.paths import ROOT
from tests.reporter import RecordingReporter

JOB = ROOT / "jobs/plain_vs_residual.py"


def job(*arguments: str) -> Study:
    return load_study(JOB, arguments)


@pytest.mark.parametrize("setting", ["digits", "cifar10"])
def test_nets_differ_in_depth_shortcut_and_seed_alone(setting: str) -> None:
    study = job(f"setting={setting}", "depths=[20,56]")
    assert len(study.trials) == 12
    assert len({trial.name for trial in study.trials}) == 12
    varied = {"model.name", "model.shortcut", "seed"}
    common = [
        {key: value for key, value in trial.recipe.flat().items() if key not in varied}
        for trial in study.trials
    ]
    assert all(fields == common[0] for fields in common)
    for trial in study.trials:
        recipe, tags = trial.recipe, trial.tags
        assert recipe.model.name == f"resnet{tags['depth']}"
        assert (
            recipe.model.shortcut
            == tags["shortcut"]
            == {"plain": "none", "residual": "zero-pad"}[tags["net"]]
        )
        assert str(recipe.seed) == tags["seed"]
        assert recipe.train.log_gradient_norms
    seeds = [trial.recipe.seed for trial in study.trials]
    assert seeds == sorted(seeds)  # An interrupted study then holds whole comparisons.


def test_plain_and_residual_nets_have_the_same_parameters_and_start() -> None:
    for depth, parameters in ((20, 269_722), (56, 853_018)):
        plain, residual = (
            build_model(f"resnet{depth}", in_channels=3, num_classes=10, shortcut=shortcut, seed=0)
            for shortcut in ("none", "zero-pad")
        )
        assert count_parameters(plain) == count_parameters(residual) == parameters
        weights = plain.state_dict()
        assert all((value == weights[name]).all() for name, value in residual.state_dict().items())


def test_the_full_setting_is_the_papers() -> None:
    study = job("setting=cifar10", "seeds=1")
    assert [trial.name.removesuffix("-seed-0") for trial in study.trials] == [
        f"{net}-{depth}" for depth in (20, 56, 110) for net in ("plain", "residual")
    ]
    recipe = study.trials[0].recipe
    assert (recipe.train.length, recipe.data.global_batch_size, recipe.data.crop) == (
        "64000 steps",
        128,
        "pad-crop",
    )
    assert (recipe.optim.lr, recipe.optim.momentum, recipe.optim.weight_decay) == (0.1, 0.9, 1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sets=1"], "sets is no argument of study()"),
        (["seeds"], "--with seeds: must be NAME=VALUE"),
        (["setting=imagenet"], "setting='imagenet': use one of digits, cifar10"),
        (["depths=[20]"], "two depths or more"),
        (["seeds=0"], "has no trials"),
    ],
)
def test_mistakes_in_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        job(*arguments)
    assert message in str(caught.value)


def test_mistakes_in_a_job_file(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("def study():\n    return 3\n")
    with pytest.raises(RecipeError, match=r"returned int, must return a Study"):
        load_study(tmp_path / "job.py")
    with pytest.raises(RecipeError, match=r"defines no function study\(\) -> Study"):
        load_study(ROOT / "jobs/digits.py")
    with pytest.raises(RecipeError, match=r"no such job file"):
        load_study(tmp_path / "other.py")
    with pytest.raises(RecipeError, match=r"--set optim\.lrr: not a field"):
        load_study(JOB, overrides=["optim.lrr=1"])
    trial = job().trials[0]
    with pytest.raises(RecipeError, match=r"several trials are called 'plain-20-seed-0'"):
        replace(job(), trials=(trial, trial))
    with pytest.raises(RecipeError, match=r"has no tag 'colour'"):
        replace(job(), family="colour")
    with pytest.raises(RecipeError, match=r"the name 'a/b'"):
        replace(job(), name="a/b")


def results(**losses: tuple[float, ...]) -> list[Result]:
    return [
        Result({"net": name[:-2], "depth": name[-2:], "seed": str(seed)}, {"train/loss": loss})
        for name, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    ]


def test_the_conclusion_states_what_was_measured() -> None:
    conclude = job().conclude
    good = conclude(
        results(plain20=(0.1, 0.2), plain56=(1.0, 2.0), residual20=(0.1, 0.1), residual56=(0.05, 0.1))
    )
    assert good.startswith("Depth hurts plain nets, skip connections undo it")
    assert "1.5 with 56 plain layers, 0.15 with 20, 0.075 with 56 residual" in good
    assert "2 of 2 seeds" in good
    # Not with seed 1: the deep plain net below the shallow one; the deep residual net near the deep plain one; the deep
    # residual net above the shallow plain one.
    for plain56, residual56 in (
        ((1.0, 0.1), (0.05, 0.01)),
        ((1.0, 2.0), (0.05, 1.9)),
        ((1.0, 2.0), (0.05, 0.3)),
    ):
        partly = conclude(
            results(plain20=(0.1, 0.2), plain56=plain56, residual20=(0.1, 0.1), residual56=residual56)
        )
        assert "in 1 of 2 seeds" in partly


def test_a_result_is_the_mean_over_the_last_steps() -> None:
    logged = [
        Entry(0, step, {"train/loss": float(step), "train/top1": 0.5, "data/bad_samples": 0.0})
        for step in (10, 20, 30, 20, 30, 40)  # A restart repeated two steps.
    ]
    entries = [*logged, Entry(0, 40, {"eval/top1": 0.7}), Entry(0, note="a note")]
    steps = metrics_by_step(entries)
    assert list(steps) == [10, 20, 30, 40]
    assert summarise(steps, last_steps=20) == {
        "train/loss": 35.0,
        "train/top1": 0.5,
        "data/bad_samples": 0.0,
        "eval/top1": 0.7,
    }
    assert summarise(steps, last_steps=10_000)["train/loss"] == 25.0


def test_an_evaluation_before_one_that_failed_is_not_the_result() -> None:
    steps = {step: {"train/loss": 1.0, "train/top1": 0.5, "eval/top1": step / 100} for step in (10, 20)}
    steps[30] = {"train/loss": 1.0, "train/top1": 0.5}
    assert summarise(steps, 20, failed=[10])["eval/top1"] == 0.2
    assert "eval/top1" not in summarise(steps, 20, failed=[10, 30])


def test_a_study_names_what_was_not_evaluated(request_of: StudyRequest) -> None:
    runs = []
    for trial, failed in zip(request_of.study.trials, ([6], [], [3]), strict=True):
        of_trial = request_of.of_trial(trial, {})
        run = choose_run(of_trial.output, of_trial.recipe, of_trial.name, resume=False)
        with Spool(run.spool) as spool:
            for step in (3, 6):
                spool.log({"train/loss": 1.0, "train/top1": 0.5}, step)
                if step not in failed:
                    spool.log({"eval/top1": step / 10}, step)
        for step in failed:
            EvaluationResults(run.storage).write(Evaluated(step, {}, "out of memory"))
        runs.append(run)
    request_of.folder.mkdir(parents=True)
    summary = report(request_of, runs)
    assert summary.not_evaluated == (
        "tiny-seed-0 step 6 (out of memory)",
        "tiny-seed-2 step 3 (out of memory)",
    )
    with summary.table.open() as file:
        assert [row["eval_error"] for row in csv.DictReader(file)] == ["-", "0.4", "0.4"]


@pytest.fixture
def request_of(digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyRequest:
    """Return the request for a study of three runs of six steps."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe = digits_recipe.with_overrides(
        [
            "train.length=6 steps",
            "train.log_every=2 steps",
            "train.eval_every=0 steps",
            "train.log_gradient_norms=true",
        ]
    )
    trials = tuple(
        Trial(f"seed-{seed}", recipe.model_copy(update={"seed": seed}), {"net": "plain", "seed": str(seed)})
        for seed in range(3)
    )
    study = Study("tiny", trials, "net", "net", 4, lambda found: f"{len(found)} runs", "Three small runs.")
    return StudyRequest(study, str(JOB), tmp_path)


def run(request: StudyRequest) -> tuple[Any, list[str]]:
    reporter = RecordingReporter()
    return run_study(request, reporter, open_group, open_publisher), reporter.notes


def interrupt_at(call: int) -> Callable[..., Any]:
    """Return a training_metrics that sends this process a SIGINT when it is called the `call`th time."""
    original, calls = loop.training_metrics, iter(range(1, 100))

    def measure(*arguments: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    return measure


def test_the_same_request_resumes_and_repeats_nothing(
    request_of: StudyRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of
    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_metrics", interrupt_at(4))  # at the first log line of the second run
        with pytest.raises(StudyInterrupted) as caught:
            run(request)
    assert caught.value.finished == 1
    client = mlflow.MlflowClient(f"sqlite:///{request.output}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None

    def runs() -> dict[str, Any]:
        return {found.info.run_name: found for found in client.search_runs([experiment.experiment_id])}

    statuses = {name: found.info.status for name, found in runs().items()}
    assert statuses == {"tiny": "KILLED", "tiny-seed-0": "FINISHED", "tiny-seed-1": "KILLED"}
    assert runs()["tiny"].data.tags["conclusion"] == "tiny: 1 of 3 runs"
    first = request.output / "runs/tiny-seed-0"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}

    summary, notes = run(request)
    assert "run tiny-seed-0: finished before" in notes
    # The main thread receives the signal, while the training thread may take one more step.
    assert {"resumed at step 2 of 6", "resumed at step 3 of 6"} & set(notes)
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    attempts = [
        json.loads((request.output / f"runs/tiny-seed-{n}/run.json").read_text())["attempt"] for n in range(3)
    ]
    assert attempts == [1, 2, 1]
    found = runs()
    assert {one.info.status for one in found.values()} == {"FINISHED"}
    parent = found.pop("tiny")
    assert len(found) == 3
    for name, child in found.items():
        tags = child.data.tags
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert (tags["study"], tags["net"], tags["seed"]) == ("tiny", "plain", name[-1])
        norms = mlflow.artifacts.load_dict(f"{child.info.artifact_uri}/gradient_norms.json")
        assert list(norms) == ["2", "4", "6"]
        assert len(norms["6"]) == 9
        assert len(child.data.metrics) < 20  # There is no metric, and so no chart, for each layer.
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {"figure.png", "runs.csv"}
    assert parent.data.tags["conclusion"] == summary.conclusion == "3 runs"
    assert parent.data.tags["mlflow.note.content"] == "Three small runs."
    with summary.table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["mlflow_run_id"] for row in rows] == [found[row["run"]].info.run_id for row in rows]
    assert [float(row["train_loss"]) for row in rows] == pytest.approx(
        [result.metrics["train/loss"] for result in summary.results], rel=1e-5
    )

    monkeypatch.setattr("resnet_dist.study.run.run_training", lambda *arguments: pytest.fail("trained again"))
    again, notes = run(request)
    assert again == summary
    assert len([note for note in notes if note.endswith("finished before")]) == 3


def test_a_changed_recipe_is_refused_before_anything_starts(request_of: StudyRequest) -> None:
    study = request_of.study
    run(replace(request_of, study=replace(study, trials=study.trials[:1])))
    changed = replace(request_of, study=study.with_overrides(["optim.lr=0.3"]))
    with pytest.raises(UserError, match=r"trial seed-0: run tiny-seed-0 .*optim\.lr was 0\.1, is 0\.3"):
        run(changed)
    with pytest.raises(UserError, match=r"trial seed-0: model\.name='resnet9'"):
        run(replace(request_of, study=study.with_overrides(["model.name=resnet9"])))
    assert not (request_of.output / "runs/tiny-seed-1").exists()


def test_a_failed_run_ends_the_study_as_failed(request_of: StudyRequest) -> None:
    good, bad = request_of.study.trials[:2]
    bad = replace(bad, recipe=bad.recipe.with_overrides(["optim.lr=1e30", "schedule.warmup=0 steps"]))
    with pytest.raises(RuntimeError, match="training loss is"):
        run(replace(request_of, study=replace(request_of.study, trials=(good, bad))))
    client = mlflow.MlflowClient(f"sqlite:///{request_of.output}/mlflow.db")
    statuses = {found.info.run_name: found.info.status for found in client.search_runs(["1"])}
    assert statuses == {"tiny": "FAILED", "tiny-seed-0": "FINISHED", "tiny-seed-1": "FAILED"}
    assert (request_of.folder / "figure.png").exists()


def test_a_finished_run_without_its_metrics_is_named(request_of: StudyRequest) -> None:
    one = replace(request_of, study=replace(request_of.study, trials=request_of.study.trials[:1]))
    run(one)
    spool = request_of.output / "runs/tiny-seed-0/spool.jsonl"
    spool.unlink()
    with pytest.raises(UserError, match=r"spool\.jsonl: holds no training loss"):
        run(one)
    client = mlflow.MlflowClient(f"sqlite:///{request_of.output}/mlflow.db")
    assert {found.info.run_name: found.info.status for found in client.search_runs(["1"])}["tiny"] == "FAILED"


def test_all_runs_share_one_ray_which_a_finished_study_does_not_start(
    request_of: StudyRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    @contextmanager
    def shared_ray(request: Request, reporter: Reporter) -> Iterator[None]:
        assert not request.local
        is_first = "ray" not in events
        events.extend(["ray"] if is_first else [])
        try:
            yield
        finally:
            events.extend(["end"] if is_first else [])

    def train(request: Request, *others: Any) -> Any:
        assert request.name is not None
        events.append(request.name)
        raise Interrupted(choose_run(request.output, request.recipe, request.name, resume=False), None)

    monkeypatch.setattr("resnet_dist.study.run.shared_ray", shared_ray)
    monkeypatch.setattr("resnet_dist.study.run.run_training", train)
    with pytest.raises(StudyInterrupted):
        run(replace(request_of, workers=1))
    assert events == ["ray", "tiny-seed-0", "end"]


def curves(output: Path, name: str) -> tuple[dict[int | None, float], bytes]:
    """Return the training loss of a run by step, and the weights at its end."""
    found = read_run(open_storage(output).at(RUNS_FOLDER).at(name))
    assert found is not None
    losses = {
        one.step: one.metrics["train/loss"]
        for one in Follower(found.spool).read()
        if "train/loss" in one.metrics
    }
    newest = list_checkpoints(found.checkpoints)[-1]
    return losses, (output / RUNS_FOLDER / name / "checkpoints" / newest / "model.safetensors").read_bytes()


STUDY_OF_TWO = """
from resnet_dist import Study, Trial
from resnet_dist.config import load_recipe

def study():
    trials = [
        Trial(f"seed-{{seed}}", load_recipe("{recipe}", [*{sets}, f"seed={{seed}}"]), {{"net": "a", "seed": str(seed)}})
        for seed in range(2)
    ]
    return Study("tiny", tuple(trials), "net", "net", 4, lambda found: "done", "Two runs.")
"""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_that_shares_ray_with_others_has_the_curve_of_a_single_run(tmp_path: Path) -> None:
    sets = ["train.length=6 steps", "train.log_every=2 steps", "model.name=resnet8", "train.figures=none"]
    recipe, file = ROOT / "jobs/digits.py", tmp_path / "two.py"
    file.write_text(STUDY_OF_TWO.format(recipe=recipe, sets=sets))
    words = [word for text in (*sets, "seed=1") for word in ("--set", text)]
    for command in (["study", str(file)], ["train", str(recipe), "--name", "alone", *words]):
        options = ["--workers=2", "--cpu", "--output", str(tmp_path)]
        subprocess.run([sys.executable, "-m", "resnet_dist", *command, *options], cwd=ROOT, check=True)
    losses, weights = curves(tmp_path, "tiny-seed-1")
    assert [*losses] == [2, 4, 6]
    assert (losses, weights) == curves(tmp_path, "alone")
    assert curves(tmp_path, "tiny-seed-0") != curves(tmp_path, "alone")
