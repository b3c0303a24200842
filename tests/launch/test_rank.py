"""The orders that a rank carries out, and the error to report: a rank that only lost a peer leaves it to the other."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from unittest.mock import MagicMock, Mock, patch

import pytest
import torch

from resnet_dist.config import Recipe
from resnet_dist.errors import TrainingError, UserError
from resnet_dist.launch import rank as ranks
from resnet_dist.launch.attempt import Attempt
from resnet_dist.launch.rank import is_echo, lost_peer, run_attempt
from resnet_dist.launch.torchrun import TorchrunRanks
from resnet_dist.order.versions import VERSIONS
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.system.environment import network
from resnet_dist.train import loop
from resnet_dist.train.loop import Outcome
from resnet_dist.world import World


@pytest.mark.parametrize(
    ("error", "may_be_echo", "is_plain"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1"), True, True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), True, True),
        (RuntimeError("[gloo/transport/tcp/device.cc:84] Unable to find address for: eth7"), True, False),
        (TrainingError("the checkpoint could not be written to /data/igloo: disk full"), False, False),
        (ValueError("a shape"), False, False),
    ],
)
def test_echoes(error: Exception, may_be_echo: bool, is_plain: bool) -> None:
    assert is_echo(error) == may_be_echo
    assert lost_peer(error) == is_plain


@pytest.mark.parametrize(("gpu", "interface"), [(True, "ib0"), (False, None)])
def test_ranks_on_gpus_use_one_network(
    gpu: bool, interface: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gloo takes NCCL's interface before the ranks meet, under Ray and under torchrun."""
    seen = []
    monkeypatch.setattr(network, "interfaces", lambda: ["lo", "ib0"])
    monkeypatch.setattr(ranks.dist, "TCPStore", Mock())
    monkeypatch.setattr(World, "join", lambda *_, **__: seen.append(os.environ.get("GLOO_SOCKET_IFNAME")))
    with patch.dict(os.environ, {"NCCL_SOCKET_IFNAME": "ib"}):
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        orders = {"rank": 1, "world_size": 2, "timeout_seconds": 9, "gpu": gpu, "device": 0}
        ranks._join({**orders, "address": "127.0.0.1", "port": 1, "node_address": "127.0.0.1"})
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        TorchrunRanks._join(MagicMock(), MagicMock(), gpu=gpu)
    assert seen == [interface, interface]


@pytest.mark.parametrize("order", VERSIONS)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_trains_with_the_order_of_the_run(
    order: int, rank: int, digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[int] = []

    def train(*arguments: object) -> Outcome:
        received.append(signature(loop.train).bind(*arguments).arguments["order_version"])
        return Outcome(1, 1, {}, finished=True)

    monkeypatch.setattr("resnet_dist.launch.rank.train", train)
    monkeypatch.setattr("resnet_dist.launch.rank.Watchdog", Mock())  # It needs a process group.
    monkeypatch.setattr(World, "gather", lambda world, value: [value, value])
    folder = RunFolder(open_storage(tmp_path), "x", None, 1, {}, order=order)
    folder.write()
    sent = asdict(Attempt.of(digits_recipe, folder, cpus=1))  # as Ray and torchrun send it
    assert run_attempt(Attempt(**sent), World(rank, 0, 2, torch.device("cpu"))) is not None
    assert received == [order]


@pytest.mark.parametrize(("num_ranks", "where"), [(1, ""), (2, f"rank 1 on {platform.node()}: ")])
def test_what_one_node_lacks_is_named_with_the_node(
    num_ranks: int, where: str, digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*arguments: object) -> Outcome:
        raise UserError("/data/index.json: no such index")

    monkeypatch.setattr("resnet_dist.launch.rank.train", train)
    monkeypatch.setattr("resnet_dist.launch.rank.Watchdog", Mock())
    monkeypatch.setattr(World, "gather", lambda world, value: [value] * num_ranks)
    folder = RunFolder(open_storage(tmp_path), "x", None, 1, {})
    folder.write()
    world = World(num_ranks - 1, 0, num_ranks, torch.device("cpu"))
    with pytest.raises(TrainingError, match=f"^{where}/data/index.json: no such index$"):
        run_attempt(Attempt.of(digits_recipe, folder, cpus=1), world)


def test_a_rank_notes_what_its_start_has_for_the_person(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(open_storage(tmp_path), "x", None, 1, {})
    attempt = asdict(Attempt.of(digits_recipe, folder, cpus=1))
    noted: list[object] = []
    monkeypatch.setattr(ranks, "report_notes", lambda attempt, notes: noted.append(notes))
    monkeypatch.setattr(ranks, "_join", lambda orders: World.single())
    monkeypatch.setattr(ranks, "run_attempt", lambda *_, **__: Outcome(1, 1, {}, finished=True))
    monkeypatch.setattr(ranks, "Fence", Mock())
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: None)
    for more in ({}, {"notes": {"key": "a line"}}):
        ranks.carry_out({"attempt": attempt, "node": "", **more})
    assert noted == [{}, {"key": "a line"}]
