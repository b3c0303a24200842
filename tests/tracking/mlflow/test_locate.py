"""The run that `--from NAME` means: a tracker that is away is no mistake of the person's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from resnet_dist.cli.main import run_command
from resnet_dist.errors import UserError
from resnet_dist.tracking.locate import locate_run
from resnet_dist.tracking.mlflow import failure
from resnet_dist.tracking.store import URI_VARIABLE, TrackerAway, TrackerRefuses
from tests.paths import ROOT
from tests.tracking.mlflow.servers import answering, unused_address


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(failure, "PROBE_SECONDS", 1)


def test_a_tracker_that_is_away_may_know_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = unused_address()
    monkeypatch.setenv(URI_VARIABLE, address)
    with pytest.raises(TrackerAway) as away:
        locate_run("first", tmp_path, "--from first")
    assert str(away.value) == (
        f"--from first: no run named first in {tmp_path}/runs, and MLflow at {address}: connection refused"
    )
    assert away.value.exit_code == 6


def test_a_tracker_that_refuses_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(401) as address:
        monkeypatch.setenv(URI_VARIABLE, address)
        with pytest.raises(TrackerRefuses, match="it answers 401 Unauthorized: set MLFLOW_TRACKING_USERNAME"):
            locate_run("first", tmp_path, "--from first")


def test_a_name_that_nobody_knows_is_one(tmp_path: Path, output: Path) -> None:
    for place in (tmp_path / "nothing", output):
        with pytest.raises(UserError, match="--from first: no run named first in .*; it has no runs"):
            locate_run("first", place, "--from first")


def test_the_command_has_the_exit_code_of_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(URI_VARIABLE, unused_address())
    words = ["resnet-dist", "train", str(ROOT / "jobs/digits.py"), "--local", "--from", "first"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(tmp_path / "output")])
    assert run_command() == 6
    assert "no run named first" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()
