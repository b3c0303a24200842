"""A run in a bucket whose server fails, as the whole command: each ends like the undisturbed one, no point lost or doubled."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_dist.runs.storage.open import open_storage
from resnet_dist.train.checkpoint.folder import MODEL_FILE, list_checkpoints
from tests.cluster.results import Result
from tests.driver.commands import STEPS, Runner, assert_undisturbed
from tests.s3_server import S3Server, no_fault

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
FAULTS = ("500", "cut request", "cut answer")


@pytest.fixture
def runner(s3: S3Server, digits_data: Path, tmp_path: Path) -> Iterator[Runner]:
    made = Runner(tmp_path, digits_data)
    yield made
    made.close()


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
