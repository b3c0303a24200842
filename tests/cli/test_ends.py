"""The ends of commands with several results: the worst of their exit codes, after all of them were reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from resnet_dist.cli.models import evaluate, export
from resnet_dist.cli.training import sweep
from resnet_dist.cli.training.ending import exit_where_left
from resnet_dist.cli.training.study import _print_results
from resnet_dist.config import Recipe, Result, Study, Trial
from resnet_dist.data.findings import BAD_IMAGE, Findings
from resnet_dist.errors import StorageError
from resnet_dist.runs.choose import choose_run
from resnet_dist.study.report import StudySummary
from resnet_dist.sweep.plan import Outcome, Plan, PlannedTrial
from resnet_dist.sweep.report import SweepSummary


def ended(plan: Plan, **fields: Any) -> SweepSummary:
    return SweepSummary(plan, "best", Path("figure.png"), Path("runs.csv"), Path("sweep.json"), **fields)


def plan_of(*outcomes: Outcome | None) -> Plan:
    trials = [PlannedTrial(f"s-{n}", ("seed=1",), outcome) for n, outcome in enumerate(outcomes)]
    return Plan(("seed=1,2",), 0, "eval/top1", {}, tuple(trials))


def end_of(summary: SweepSummary, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the exit code of `sweep` with these results."""
    monkeypatch.setattr("resnet_dist.sweep.run.run_sweep", lambda *arguments: summary)
    monkeypatch.setattr("resnet_dist.tracking.open.check_tracker", lambda *arguments: None)
    monkeypatch.setattr(sweep, "_print", lambda *arguments: None)
    request: Any = SimpleNamespace(output=Path(), experiment="x", folder=Path("output/sweeps/s"))
    try:
        sweep._run(request, Path())
    except typer.Exit as end:
        return end.exit_code
    return 0


def test_every_trial_without_a_result_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], digits_recipe: Recipe, tmp_path: Path
) -> None:
    done = Outcome("finished", 0.5, 24)
    assert end_of(ended(plan_of(done, done)), monkeypatch) == 0
    plan = plan_of(done, Outcome("interrupted"), None, Outcome("failed", reason="the disk is full"))
    run = choose_run(tmp_path, digits_recipe, "s-0", resume=False).ended("FINISHED", ["3 metrics"])
    assert end_of(ended(plan, runs=(run,)), monkeypatch) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("exit code 1: run s-0 is trained, but not sent to MLflow: 3 metrics; ")
    assert lines[1:4] == [
        "error: trial s-1 interrupted",
        "error: trial s-2 left",
        "error: trial s-3 failed: the disk is full",
    ]
    assert lines[4].startswith("3 of 4 trials have no result; once that is mended")


def test_a_sweep_is_called_a_sweep_and_names_what_was_not_evaluated(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(
        Outcome("finished", 0.5, 24), Outcome("finished", 0.5, 18, reason="not evaluated: step 24 (lost)")
    )
    assert end_of(ended(plan), monkeypatch) == 3
    assert capfd.readouterr().err == "exit code 3: not evaluated: s-1 step 24 (lost)\n"
    assert end_of(ended(plan, unsent=("the status",)), monkeypatch) == 4
    assert "exit code 4: sweep s is complete, but not sent to MLflow: the status; " in capfd.readouterr().err


def test_a_study_without_an_evaluation_is_printed(
    capfd: pytest.CaptureFixture[str], digits_recipe: Recipe
) -> None:
    study = Study("tiny", (Trial("a", digits_recipe, {"net": "plain"}),), "net", "net", 4, lambda found: "")
    result = Result({"net": "plain"}, {"train/loss": 1.0, "train/top1": 0.5})
    summary = StudySummary(
        (result,), "", Path("f.png"), Path("r.csv"), not_evaluated=("tiny-a step 6 (lost)",)
    )
    _print_results(study, summary, Path("output"))
    assert "eval top-1 -\n" in capfd.readouterr().out
    with pytest.raises(typer.Exit) as end:
        exit_where_left(summary.not_evaluated, [], (Path(), ()))
    assert end.value.exit_code == 3


class Candidate:
    """A model that cannot be registered, and the calls before that was tried."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def register(self) -> str:
        self._calls.append("registered")
        raise StorageError("the model does not load")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    for command in (evaluate, export):
        monkeypatch.setattr(command, "candidate_of", lambda *arguments: Candidate(found))
        monkeypatch.setattr(command, "registration_of", lambda text: None)
    monkeypatch.setattr("resnet_dist.predict.find.find_model", lambda *arguments: None)
    trained = SimpleNamespace(step=1, recipe=SimpleNamespace(data=SimpleNamespace(max_bad_fraction=0.0)))
    monkeypatch.setattr("resnet_dist.train.checkpoint.load.load_model", lambda *arguments, **options: trained)
    index = SimpleNamespace(location="x", num_samples=1)
    result = SimpleNamespace(bad=[], metrics={}, top1={})
    monkeypatch.setattr(
        evaluate, "_job", lambda *arguments, **options: (SimpleNamespace(trained=trained), index)
    )
    monkeypatch.setattr(evaluate, "_evaluated_here", lambda *arguments: result)
    monkeypatch.setattr("resnet_dist.evaluation.report.files_of", lambda *arguments: {})
    return found


@pytest.mark.parametrize("is_sent", [True, False])
def test_an_evaluation_is_logged_before_its_model_is_registered(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, is_sent: bool
) -> None:
    def sender(*arguments: Any) -> Callable[..., bool]:
        return lambda *result: calls.append("logged") or is_sent  # type: ignore[func-returns-value]

    monkeypatch.setattr(evaluate, "_sender", sender)
    with pytest.raises(StorageError, match="does not load"):
        evaluate.evaluate("m", "s", log_name="test")
    assert calls == ["logged", "registered"]
    monkeypatch.setattr(evaluate, "candidate_of", lambda *arguments: None)
    if is_sent:
        evaluate.evaluate("m", "s", log_name="test")
    else:
        with pytest.raises(typer.Exit) as end:
            evaluate.evaluate("m", "s", log_name="test")
        assert end.value.exit_code == 4


def test_an_export_reports_what_it_left_out_before_its_model_is_registered(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def samples_of(trained: Any, samples: Any, findings: Findings) -> tuple[list[Any], str]:
        findings.leave_out("b.jpg", BAD_IMAGE, "no image")
        return [], "2 images"

    monkeypatch.setattr("resnet_dist.export.samples.samples_of", samples_of)
    monkeypatch.setattr("resnet_dist.export.run.export", lambda *arguments, **options: "equal")
    with pytest.raises(StorageError, match="does not load"):
        export.export("m", Path("m.onnx"))
    assert calls == ["registered"]
    assert "b.jpg" in capfd.readouterr().err
