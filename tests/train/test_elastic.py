"""One, two and four ranks of the same recipe draw the same curve."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from resnet_dist.config import Recipe
from resnet_dist.train import loop
from resnet_dist.world import World

STEPS = 14  # an epoch has eleven


class Losses:
    def __init__(self) -> None:
        self.values: list[float] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.values += [value for name, value in metrics.items() if name in ("train/loss", "eval/loss")]

    def note(self, text: str) -> None:
        pass


def run_rank(rank: int, world_size: int, port: int, recipe_json: str, folder: str, queue: Any) -> None:
    torch.set_num_threads(1)
    world = World.single()
    if world_size > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), **address)
        world = World.from_environment(gpu=False, timeout_seconds=120)
    losses = Losses()
    outcome = loop.train(Recipe.from_json(recipe_json), Path(folder), world, losses)
    queue.put((rank, losses.values, outcome.step))


def run_ranks(world_size: int, recipe: Recipe, folder: Path) -> list[float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    ranks = [
        context.Process(target=run_rank, args=(rank, world_size, port, recipe.to_json(), str(folder), queue))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    results = sorted(queue.get(timeout=200) for _ in ranks)
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert all(result == (rank, *results[0][1:]) for rank, result in enumerate(results))
    assert results[0][2] == STEPS
    values: list[float] = results[0][1]
    return values


@pytest.fixture
def recipe(digits_recipe: Recipe) -> Recipe:
    lengths = [f"train.length={STEPS} steps", "train.log_every=1 steps", "train.eval_every=7 steps"]
    return digits_recipe.with_overrides([*lengths, "data.micro_batch_size=32", "data.crop=pad-crop"])


def test_ranks_draw_the_same_curve(recipe: Recipe, tmp_path: Path) -> None:
    one = run_ranks(1, recipe, tmp_path / "one")
    assert len(one) == STEPS + 2
    for world_size in (2, 4):
        assert run_ranks(world_size, recipe, tmp_path / str(world_size)) == pytest.approx(one, rel=1e-4)


def test_a_run_goes_on_with_another_number_of_ranks(recipe: Recipe, tmp_path: Path) -> None:
    whole = run_ranks(1, recipe, tmp_path / "whole")
    recorder, calls = Losses(), iter(range(100))
    torch.set_num_threads(1)
    stopped = loop.train(recipe, tmp_path / "moved", World.single(), recorder, lambda: next(calls) == 5)
    assert stopped.step == 6
    rest = run_ranks(2, recipe, tmp_path / "moved")
    assert recorder.values + rest == pytest.approx(whole, rel=1e-4)


def test_mixing_policies_and_caches_draw_the_same_curve_on_two_ranks(recipe: Recipe, tmp_path: Path) -> None:
    everything = [
        "data.mixup=0.4",
        "data.cutmix=1.0",
        "data.flip=true",
        "data.policy=trivial-augment",
        "data.color_jitter=0.3",
        "data.erase=0.25",
    ]
    augmented = recipe.with_overrides(everything)
    one = run_ranks(1, augmented, tmp_path / "one")
    assert one != pytest.approx(run_ranks(1, recipe, tmp_path / "plain"), rel=1e-2)
    cached = augmented.with_overrides(["data.cache=ram"])
    assert run_ranks(1, cached, tmp_path / "cached") == one
    two = run_ranks(2, augmented, tmp_path / "two")
    assert run_ranks(2, cached, tmp_path / "both") == two
    assert two[:8] == pytest.approx(one[:8], rel=1e-4)  # rounding, 1e-9 at first, grows with every step


def test_moving_sizes_and_repeats_draw_the_same_curve_on_two_ranks(recipe: Recipe, tmp_path: Path) -> None:
    features = [
        'data.train_sizes=[["0 epochs", 6], ["0.5 epochs", 7], ["1 epochs", 8]]',
        "data.repeats=2",
        "data.mixup=0.2",
        "data.flip=alternate",
        "data.eval_flip=true",
        "data.eval_size=9",
    ]
    changed = recipe.with_overrides(features)
    one = run_ranks(1, changed, tmp_path / "one")
    assert one != pytest.approx(run_ranks(1, recipe, tmp_path / "plain"), rel=1e-2)
    two = run_ranks(2, changed, tmp_path / "two")
    assert two[:8] == pytest.approx(one[:8], rel=1e-4)  # rounding, 1e-9 at first, grows with every step
