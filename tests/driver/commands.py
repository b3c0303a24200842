"""Runs of `train --local` as whole commands, which faults strike, and the comparison with one that nothing struck."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.runs.folder import read_run
from resnet_dist.runs.storage.open import open_storage
from tests.cluster.hosts import wait_until
from tests.cluster.results import Result
from tests.paths import ROOT

SECONDS = 400.0
STEPS = 48


@dataclass
class Command:
    """One `train --local` that runs; its output goes to a file."""

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.output() or self.process.poll() is not None, SECONDS, self.output)
        assert text in self.output()

    def end(self) -> tuple[int, str]:
        """Wait for its end; return exit code and output."""
        return self.process.wait(SECONDS), self.output()


class Runner:
    """Starts commands that share a store of MLflow, and reads what their runs have left."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.variables: dict[str, str] = {}  # additional ones of the commands
        self.before: list[str] = []  # a command that starts each of them
        self.store = f"sqlite:///{folder}/mlflow.db"
        self.commands: list[Command] = []

    def train(self, output: str, name: str = "x", fields: Mapping[str, str] | None = None) -> Command:
        settings = {
            "data.train": f"{self.data}/train",
            "data.eval": f"{self.data}/eval",
            "model.name": "resnet8",
            "train.length": f"{STEPS} steps",
            "train.eval_every": "24 steps",
            "train.checkpoint_every": "4 steps",
            "train.log_every": "2 steps",
        }
        command = [sys.executable, "-m", "resnet_dist", "train", str(ROOT / "jobs/digits.py"), "--local"]
        command += ["--output", output, "--name", name]
        command += [f"--set={key}={value}" for key, value in (settings | dict(fields or {})).items()]
        log = self.folder / f"log-{len(self.commands)}.txt"
        environment = {**os.environ, "MLFLOW_TRACKING_URI": self.store, "OMP_NUM_THREADS": "1"}
        environment |= self.variables
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*self.before, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,
            )
        self.commands.append(Command(process, log))
        return self.commands[-1]

    def result(self, output: str, name: str = "x") -> Result:
        run = read_run(open_storage(f"{output}/runs/{name}"))
        assert run is not None
        return Result.of(self.store, run)

    def close(self) -> None:
        for command in self.commands:
            command.process.kill()
            command.process.wait()


def assert_undisturbed(result: Result, undisturbed: Result) -> None:
    assert result.status == "FINISHED"
    assert (result.num_lost(undisturbed), result.num_doubled(undisturbed)) == (0, 0)
    assert result == undisturbed  # bit for bit, the weights too
