"""The process that Ray starts for a rank: it runs the rank in a copy or in itself, and dies with it."""

from __future__ import annotations

import os
import platform
import signal
from typing import Any

import pytest

from resnet_dist.config import Recipe
from resnet_dist.launch import rank
from resnet_dist.launch.attempt import Attempt
from resnet_dist.launch.on_ray import launcher, worker
from resnet_dist.launch.preload.client import OFF_VARIABLE, Died, Unavailable
from resnet_dist.launch.preload.wire import NOTES
from resnet_dist.system.cpus import SPIN_TURNS, SPIN_VARIABLE, WAIT_VARIABLE

OUTCOME = {"step": 1, "total_steps": 1, "metrics": {}, "finished": True}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run every rank at once; return the keys of those that ran in a copy."""
    asked: list[str] = []

    def run_rank(target: str, orders: dict[str, Any], key: str) -> dict[str, Any]:
        asked.append(key)
        if orders.get("fails"):
            raise orders["fails"]
        return {**OUTCOME, "step": 2}

    monkeypatch.setattr(worker, "run_rank", run_rank)
    monkeypatch.setattr(worker, "_complete", lambda orders: {**orders, "node": "ab", "rank": 3})
    monkeypatch.setattr(rank, "carry_out", lambda orders: {**OUTCOME, "metrics": orders.get(NOTES, {})})
    return asked


def orders_of(recipe: Recipe, **others: Any) -> dict[str, Any]:
    attempt = Attempt(recipe.to_json(), "s3://b/run", cpus=1, number=1, token="t", host="h", holder="me")
    return {**launcher.orders_of(attempt, gpu=False), **others}


def test_a_rank_is_a_copy_of_the_process_of_its_run_and_node(digits_recipe: Recipe, keys: list[str]) -> None:
    assert worker.rank_main(orders_of(digits_recipe))["step"] == 2
    assert keys == ["s3://b/run\nme\n1\nab"]


def test_a_rank_runs_in_the_process_of_ray_where_there_is_no_copy(
    digits_recipe: Recipe,
    keys: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv(WAIT_VARIABLE, raising=False)
    monkeypatch.delenv(SPIN_VARIABLE, raising=False)
    line = f"rank 3 on {platform.node()} imports for itself: no room"
    outcome = worker.rank_main(orders_of(digits_recipe, fails=Unavailable("no room")))
    assert outcome == {**OUTCOME, "metrics": {"imports-ab": line}}  # The rank notes it for its driver.
    assert len(keys) == 1
    assert capsys.readouterr().err == f"{line}\n"
    assert (
        os.environ[SPIN_VARIABLE] == SPIN_TURNS
    )  # The command line has set it in the driver's process alone.
    monkeypatch.setenv(OFF_VARIABLE, "0")
    assert worker.rank_main(orders_of(digits_recipe)) == OUTCOME
    assert len(keys) == 1


def test_the_process_of_ray_dies_with_its_rank(
    digits_recipe: Recipe,
    keys: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ray reports that with host and cause, and the driver starts the ranks again."""
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((pid, number)))
    with pytest.raises(Died):
        worker.rank_main(orders_of(digits_recipe, fails=Died("ended by SIGSEGV")))
    assert capsys.readouterr().err == "ended by SIGSEGV\n"
    assert signals == [(os.getpid(), signal.SIGKILL)]
    assert keys


@pytest.mark.parametrize(
    ("own", "visible", "index"), [("3", "2,3", 1), ("2", "2,3", 0), ("0", "", 0), ("1", "0,1,2", 1)]
)
def test_the_gpu_of_a_rank(monkeypatch: pytest.MonkeyPatch, own: str, visible: str, index: int) -> None:
    class Context:
        def get_accelerator_ids(self) -> dict[str, list[str]]:
            return {"GPU": [own]}

    monkeypatch.setattr(worker.ray, "get_runtime_context", Context)
    monkeypatch.setenv(worker.GPUS_VARIABLE, visible)
    assert worker._device_index() == index
