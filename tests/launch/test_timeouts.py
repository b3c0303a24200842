"""The watchdog names the rank that hangs before any collective gives up, which names nobody, in every launcher."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from resnet_dist.config import Recipe
from resnet_dist.launch import rank
from resnet_dist.launch.attempt import Attempt
from resnet_dist.launch.on_ray import launcher
from resnet_dist.launch.torchrun import TorchrunRanks
from resnet_dist.train.watch.control import Control
from resnet_dist.train.watch.positions import POLLS_TO_ANSWER
from resnet_dist.train.watch.progress import FIRST_TIMEOUT_FACTOR, collective_timeout_seconds
from resnet_dist.train.watch.watchdog import Watchdog
from resnet_dist.world import World
from tests.train.ranks import run_ranks

TIMEOUTS = [0.1, 2.0, 600.0, 86_400.0]


def longest_watch(stall_timeout: float) -> float:
    """Return after how long the watchdog has named the ranks that are behind, at the latest."""
    dog = Watchdog(Mock(phase="x", moves=0), Mock(), World.single(), stall_timeout)
    return FIRST_TIMEOUT_FACTOR * stall_timeout + (POLLS_TO_ANSWER + 1) * dog.poll_seconds


def attempt_of(recipe: Recipe, stall_timeout: float) -> Attempt:
    changed = recipe.with_overrides([f"train.stall_timeout_seconds={stall_timeout}"])
    return Attempt(changed.to_json(), "/nowhere", cpus=1, number=1, token="t", host="here")


@pytest.mark.parametrize("stall_timeout", TIMEOUTS)
def test_ray_train_gets_it(
    stall_timeout: float, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[dict[str, Any]] = []
    monkeypatch.setattr(dist, "TCPStore", lambda *places, **options: joined.append(options) or Mock())
    monkeypatch.setattr(dist, "init_process_group", lambda *backend, **options: joined.append(options))
    orders = launcher.orders_of(attempt_of(digits_recipe, stall_timeout), gpu=False)
    place = {"rank": 1, "world_size": 2, "device": 0, "address": "127.0.0.1", "port": 1}
    rank._join({**orders, **place})
    for options in joined:
        assert options["timeout"].total_seconds() > longest_watch(stall_timeout)
    assert len(joined) == 2


@pytest.mark.parametrize("stall_timeout", TIMEOUTS)
def test_torchrun_gets_it(
    stall_timeout: float, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = Mock()
    monkeypatch.setattr(dist, "init_process_group", init)
    ranks = object.__new__(TorchrunRanks)
    ranks.rank, ranks.local_rank, ranks.world_size, ranks._group_store = 1, 1, 2, Mock()
    ranks._join(attempt_of(digits_recipe, stall_timeout), gpu=False)
    limit = timedelta(seconds=longest_watch(stall_timeout))
    assert init.call_args.kwargs["timeout"] > limit
    # New groups meet in the store, which would give up after 30 minutes.
    ranks._group_store.set_timeout.assert_called_once()
    assert ranks._group_store.set_timeout.call_args.args[0] > limit


def timeouts(world: World, stall_timeout: float) -> tuple[float, float]:
    """Return the timeouts of the control group and of the store, in seconds."""
    with Control(world, stall_timeout, lambda: False, lambda: False) as control:
        options = control._group._get_backend(world.device).options
        store = dist.distributed_c10d._get_default_store()
        return options._timeout.total_seconds(), store.timeout.total_seconds()


def test_the_control_group_gets_it_too() -> None:
    for control, store in run_ranks(2, timeouts, 86_400.0):
        assert control == pytest.approx(collective_timeout_seconds(86_400.0), abs=1)
        assert control > longest_watch(86_400.0)
        assert store == 120  # The timeout of `run_ranks`, which `World.join` sets.
