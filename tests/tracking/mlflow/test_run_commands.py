"""`resnet-dist runs` as a person types it: what it prints, and its exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from resnet_dist.cli.main import run_command
from resnet_dist.tracking.store import URI_VARIABLE
from tests.tracking.mlflow.servers import unused_address

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs `resnet-dist runs …` on a store with two runs, one of which is the best."""
    client = mlflow.MlflowClient(f"sqlite:///{output}/mlflow.db")
    experiment = client.create_experiment("digits", artifact_location=output.as_uri())
    for name, lr, curve in (("low", "0.1", (0.25, 0.75)), ("high", "0.3", (0.25, 0.5))):
        run_id = client.create_run(experiment, run_name=name).info.run_id
        client.log_param(run_id, "optim.lr", lr)
        for step, value in enumerate(curve):
            client.log_metric(run_id, "eval/top1", value, step=10 * step)
        client.set_terminated(run_id)
    client.create_run(client.create_experiment("other"), run_name="old", start_time=1)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["resnet-dist", "runs", *words, "--output", str(output)])
        code = run_command()
        return code, *capsys.readouterr()

    return run


def test_runs_are_listed_shown_and_compared(command: Command) -> None:
    code, out, _ = command()
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("experiment digits, MLflow in /")
    assert lines[0].endswith("; others: other")
    assert [line.split()[0] for line in lines[1:]] == ["RUN", "low", "high"]
    code, out, _ = command("--json", "--filter", "params.`optim.lr` = '0.3'")
    assert [run["run"] for run in json.loads(out)["runs"]] == ["high"]
    code, out, _ = command("best")
    assert out.startswith("run         low (")
    assert "eval/top1: 75.00% at step 10" in out
    code, out, _ = command("show", "high", "--json")
    assert json.loads(out)["curves"]["eval/top1"] == [[0, 0.25], [10, 0.5]]
    code, out, _ = command("compare", "low", "high")
    assert code == 0
    assert "optim.lr   0.1       0.3" in out
    assert "eval/top1 from 25.00% to 75.00%, steps 0 to 10" in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["show", "lo"], 2, "has no run named lo; did you mean low?"),
        (["compare", "low", "low"], 2, "low: one run cannot be compared; name two or more"),
        (["--filter", "nonsense"], 2, "--filter 'nonsense': Invalid clause"),
        (["--filter", "params.x = '1'"], 2, "has no runs that --filter \"params.x = '1'\" selects"),
        (["best", "--experiment", "other"], 2, "no run of experiment other has been evaluated yet"),
        (["--experiment", "othr"], 2, "has no such experiment; did you mean other?"),
    ],
)
def test_a_mistake_is_one_sentence(command: Command, words: list[str], code: int, message: str) -> None:
    ended, out, err = command(*words)
    assert (ended, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1


def test_one_run_by_two_names_is_one(command: Command, output: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{output}/mlflow.db")
    (found,) = client.search_runs(["1"], "attributes.run_name = 'low'")
    code, out, err = command("compare", "low", found.info.run_id)
    assert (code, out) == (2, "")
    assert err == f"error: low and {found.info.run_id} are the same run, low; name two or more\n"


def test_the_limit_is_named_where_there_are_more(command: Command, output: Path) -> None:
    hint = "--limit 0 lists all"
    assert hint not in command("--limit", "2")[1]
    assert command("--limit", "1")[1].splitlines()[-1] == f"the best 1 of the experiment; {hint}"
    assert json.loads(command("--limit", "1", "--json")[1])["more"] is True
    assert json.loads(command("--limit", "2", "--json")[1])["more"] is False
    # The runs of studies, which are no rows, take no place of one.
    client = mlflow.MlflowClient(f"sqlite:///{output}/mlflow.db")
    for number in range(3):
        study = client.create_run("1", run_name=f"study-{number}", tags={"study": "s"}).info.run_id
        client.log_metric(study, "eval/top1", 1.0)
    _, out, _ = command("--limit", "2")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["RUN", "low", "high"]
    assert command("--limit", "1")[1].splitlines()[-1].endswith(hint)
    assert command("best")[1].startswith("run         low (")


def test_a_tracker_that_is_away_has_its_own_code(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI_VARIABLE, unused_address())
    code, out, err = command()
    assert (code, out) == (6, "")
    assert err.endswith("connection refused\n")
