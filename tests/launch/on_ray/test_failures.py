"""Whose fault it was: a mistake, a defect, or a machine that went away, by what Ray Train raises."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RayActorError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from resnet_dist.config import Recipe, WorkerRange
from resnet_dist.errors import Diverged, RankFailed, RanksLost, StorageError, Superseded, TrainingError
from resnet_dist.launch.on_ray import launcher
from resnet_dist.launch.on_ray.failures import NotPlaced, explain
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Unreachable
from resnet_dist.train.watch.watchdog import Stalled

ECHO = RuntimeError("[pair.cc:545] gloo: Connection reset by peer. GLHF!")
WORKER = "A worker health check failed.\nWorker info: Worker(hostname='h2', node_id='ab', node_ip='10.0.0.2', pid=7)"
KILLED = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"


def died(text: str = KILLED, *, preempted: bool = False) -> WorkerHealthCheckFailedError:
    """Return what Ray Train reports of a rank whose process has gone."""
    return WorkerHealthCheckFailedError(WORKER, RayActorError(error_msg=text, preempted=preempted))


def explained(*failures: Exception) -> Exception:
    """Explain an attempt in which the ranks failed so, rank 0 first."""
    return explain(WorkerGroupError("a\nlong\ndump", dict(enumerate(failures))))


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        (KILLED, "was killed or crashed"),
        ("The actor died because its node has died. Node Id: ab", "was lost with its node"),
        (
            "Task was killed due to the node running low on memory.",
            "was killed because its node ran out of memory",
        ),
        ("The actor 12 is unavailable: rpc error", "cannot be reached"),
        ("something new", "was lost (WorkerHealthCheckFailedError: A worker health check failed."),
    ],
)
def test_a_rank_that_went_away_is_named_with_its_host_and_starts_again(text: str, meaning: str) -> None:
    error = explained(ECHO, died(text))
    assert isinstance(error, RanksLost)
    assert str(error).startswith(f"rank 1 on h2 (10.0.0.2) {meaning}")
    assert (error.preempted, error.begun) == (False, True)
    assert "long\ndump" in error.details


@pytest.mark.parametrize(
    "stale",
    [
        # It stood still for some seconds, and nobody has taken its run over.
        Superseded("the driver has not renewed its lease for 45 s: attempt 1 ends"),
        Unreachable("s3://runs/a: no answer"),
    ],
)
def test_ranks_that_lost_their_driver_or_storage_start_again(stale: StorageError) -> None:
    error = explained(stale, ECHO)
    assert isinstance(error, RanksLost)
    assert str(error) == str(stale)


def test_a_preemption_is_recognised() -> None:
    error = explained(died(preempted=True), ECHO)
    assert isinstance(error, RanksLost)
    assert error.preempted
    assert "preempted" in str(error)
    planned = explain(
        PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"ab": [2, 3]}))
    )
    assert isinstance(planned, RanksLost)
    assert planned.preempted
    assert "ranks 2, 3" in str(planned)


def test_a_mistake_wins_over_everything_that_it_caused() -> None:
    for kind in (TrainingError, Diverged):
        assert type(explained(ECHO, died(), kind("the training loss is not finite at step 3"))) is kind
    error = explained(ECHO, died(), TrainingError("the training loss is not finite at step 3"))
    assert str(error) == "the training loss is not finite at step 3"


def test_a_defect_is_not_retried_and_is_short() -> None:
    error = explained(ECHO, ValueError("\n".join(f"line {number}" for number in range(40))))
    assert type(error) is RankFailed
    assert str(error).startswith("rank 1 failed: ValueError: line 0\n")
    assert "30 more lines" in str(error)
    assert len(str(error).splitlines()) <= 15


@pytest.mark.parametrize("failure", [WorkerHealthCheckTimeoutError("no answer"), ActorDiedError(), ECHO])
def test_silence_and_broken_connections_start_again(failure: Exception) -> None:
    error = explained(failure)
    assert type(error) is RanksLost
    assert str(error).startswith("rank 0 ")


def test_a_rank_that_hangs_starts_again() -> None:
    error = explained(Stalled("rank 1 stands still at step 4"), ECHO)
    assert type(error) is RanksLost
    assert str(error) == "rank 1 stands still at step 4"


def test_failures_before_training_begins() -> None:
    assert isinstance(explain(ControllerError(WorkerGroupStartupTimeoutError(2))), NotPlaced)
    failed = WorkerGroupStartupFailedError("One of the worker actors failed to initialize")
    failed.__cause__ = died()
    error = explain(ControllerError(failed))
    assert type(error) is RanksLost
    assert "h2 (10.0.0.2)" in str(error)
    unconnected = explain(ControllerError(ECHO))
    assert type(unconnected) is RanksLost
    assert (error.begun, unconnected.begun) == (False, False)
    assert type(explain(ControllerError(KeyError("x")))) is RankFailed
    assert isinstance(explain(KeyboardInterrupt()), RankFailed)


def test_a_storage_that_is_away_when_ranks_start_is_no_failure_of_the_run(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver reads the run, too: the ranks start again, and the threads that they had are not forgotten."""
    monkeypatch.setattr(launcher, "shared_ray", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(launcher, "nodes", list)
    run = RunFolder(open_storage(tmp_path / "x"), "x", None, 1, {})

    def read(name: str) -> bytes:
        raise Unreachable("s3://b: it does not answer in time")

    monkeypatch.setattr(run.storage, "read", read)
    options = {"gpu": False, "address": None, "wait_seconds": 0.0, "report": lambda text: None}
    with (
        launcher.ray_launcher(digits_recipe, workers=WorkerRange.exactly(2), **options) as launch,
        pytest.raises(RanksLost, match="does not answer in time") as lost,
    ):
        launch(run)
    assert not lost.value.begun
