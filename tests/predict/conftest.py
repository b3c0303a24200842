"""A model of random weights, and the command that predicts with it, in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resnet_dist.cli.main import run_command
from tests.checkpoints import COLORED, random_checkpoint

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_checkpoint(tmp_path_factory.mktemp("predict"), *COLORED)[0])


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs a command in `tmp_path`, and returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["resnet-dist", *map(str, words)])
        code = run_command()
        return code, *capsys.readouterr()

    return run
