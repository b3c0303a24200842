"""A run in a bucket whose server fails, as the whole command: each ends like the undisturbed one, no point lost or doubled."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from resnet_dist.runs.folder import read_run
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.train.checkpoint.folder import MODEL_FILE, list_checkpoints
from tests.cluster.hosts import wait_until
from tests.cluster.results import Result
from tests.paths import ROOT
from tests.s3_server import S3Server, no_fault

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
SECONDS = 400.0
STEPS = 48
FAULTS = ("500", "cut request", "cut answer")


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
        self.store = f"sqlite:///{folder}/mlflow.db"
        self.commands: list[Command] = []

    def train(self, output: str, name: str = "x") -> Command:
        settings = {
            "data.train": self.data / "train",
            "data.eval": self.data / "eval",
            "model.name": "resnet8",
            "train.length": f"{STEPS} steps",
            "train.eval_every": "24 steps",
            "train.checkpoint_every": "4 steps",
            "train.log_every": "2 steps",
        }
        command = [sys.executable, "-m", "resnet_dist", "train", str(ROOT / "jobs/digits.py"), "--local"]
        command += ["--output", output, "--name", name]
        command += [f"--set={key}={value}" for key, value in settings.items()]
        log = self.folder / f"log-{len(self.commands)}.txt"
        environment = {**os.environ, "MLFLOW_TRACKING_URI": self.store, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=self.folder
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


@pytest.fixture(scope="module")
def undisturbed(digits_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("undisturbed")
    runner = Runner(folder, digits_data)
    code, output = runner.train(str(folder)).end()
    assert code == 0, output
    return runner.result(str(folder))


@pytest.fixture
def runner(s3: S3Server, digits_data: Path, tmp_path: Path) -> Iterator[Runner]:
    made = Runner(tmp_path, digits_data)
    yield made
    made.close()


def assert_undisturbed(result: Result, undisturbed: Result) -> None:
    assert result.status == "FINISHED"
    assert (result.num_lost(undisturbed), result.num_doubled(undisturbed)) == (0, 0)
    assert result == undisturbed  # bit for bit, the weights too


def test_every_request_refused_for_a_minute(s3: S3Server, runner: Runner, undisturbed: Result) -> None:
    output = f"s3://{s3.new_bucket()}/output"
    command = runner.train(output)
    command.wait_for("\nstep 8/")
    s3.proxy.fault = lambda method, path: "refuse"
    end = threading.Timer(60.0, lambda: setattr(s3.proxy, "fault", no_fault))
    end.start()
    code, text = command.end()
    end.join()
    assert code == 0, text
    assert s3.proxy.seen["refuse"] > 0
    assert_undisturbed(runner.result(output), undisturbed)


def test_one_in_twenty_requests_fails_or_is_cut(s3: S3Server, runner: Runner, undisturbed: Result) -> None:
    rng = random.Random(0)
    s3.proxy.fault = lambda method, path: rng.choice(FAULTS) if rng.random() < 0.05 else None
    output = f"s3://{s3.new_bucket()}/output"
    code, text = runner.train(output).end()
    assert code == 0, text
    assert sum(s3.proxy.seen.values()) > 0
    s3.proxy.fault = no_fault
    assert_undisturbed(runner.result(output), undisturbed)


def test_a_damaged_checkpoint_costs_its_steps_alone(
    s3: S3Server, runner: Runner, undisturbed: Result
) -> None:
    output = f"s3://{s3.new_bucket()}/output"
    command = runner.train(output)
    command.wait_for("\nstep 20/")
    command.process.kill()
    command.process.wait()
    checkpoints = open_storage(f"{output}/runs/x/checkpoints")
    before, newest = list_checkpoints(checkpoints)[-2:]
    content = checkpoints.read(f"{newest}/{MODEL_FILE}")
    assert content is not None
    checkpoints.write(f"{newest}/{MODEL_FILE}", content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    code, text = runner.train(output).end()
    assert code == 0, text
    assert f"{newest}/{MODEL_FILE} does not match its checksum" in text
    assert f"resumed at step {int(before.removeprefix('step-'))} of {STEPS}" in text
    assert_undisturbed(runner.result(output), undisturbed)


def test_of_two_drivers_at_once_one_trains(s3: S3Server, runner: Runner, undisturbed: Result) -> None:
    output = f"s3://{s3.new_bucket()}/output"
    ends = [command.end() for command in [runner.train(output), runner.train(output)]]
    (_, _), (code, text) = sorted(ends)
    assert [code for code, _ in sorted(ends)] == [0, 2], ends
    assert "error: run x is being trained by another process" in text
    assert code == 2
    assert_undisturbed(runner.result(output), undisturbed)
