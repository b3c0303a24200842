"""Errors that stop a run name what a person can change."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet_dist.config import Recipe
from resnet_dist.data.batches.loader import Batch, Loader
from resnet_dist.data.shards.index import read_index
from resnet_dist.errors import TrainingError
from resnet_dist.train import loop
from resnet_dist.train.plan import order_of
from resnet_dist.train.state.meter import Meter, NotFinite
from resnet_dist.train.watch.guards import check_agreement, out_of_memory
from resnet_dist.world import World
from tests.paths import list_checkpoints
from tests.train.ranks import run_ranks
from tests.train.runs import Recorder

WORLD = World.single()


def add_step(meter: Meter, losses: list[float]) -> None:
    sums = torch.tensor([[loss, 0.0, 1.0] for loss in losses], dtype=torch.float64)
    meter.add(sums, samples=len(losses), bad=(), wait_seconds=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_meter_finds_the_first_loss_that_is_not_finite(bad: float) -> None:
    meter = Meter(torch.device("cpu"))
    for losses in ([1.0, 2.0], [3.0, 4.0], [5.0, bad], [1.0, 1.0], [-bad, 1.0]):
        add_step(meter, losses)
    meter.gather(WORLD)
    assert meter.not_finite == NotFinite(steps_ago=2, rank=0, micro_batch=1)
    meter.flush(WORLD)
    add_step(meter, [1.0, 1.0])
    meter.gather(WORLD)
    assert meter.not_finite is None


def poison(world: World, recipe_json: str, folder: str) -> tuple[str, list[str]]:
    """Train with a data set in which sample 77 turns the loss to NaN, on whichever rank has it; return the error."""
    loader_batch_at = Loader.batch_at

    def batch_at(self: Loader, step: int) -> Batch:
        batch = loader_batch_at(self, step)
        if self.order.training:
            batch.weights_B[torch.from_numpy(batch.ids_B == 77)] = float("nan")
        return batch

    Loader.batch_at = batch_at  # type: ignore[method-assign]
    log = Recorder()
    try:
        loop.train(Recipe.from_json(recipe_json), Path(folder), world, log)
    except TrainingError as error:
        return str(error), log.notes
    return "trained", log.notes


@pytest.mark.parametrize("looks", ["checkpoint", "eval"])  # before the first log line
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_names_step_rank_and_samples(
    digits_recipe: Recipe, tmp_path: Path, world_size: int, looks: str
) -> None:
    lengths = ["train.log_every=20 steps", "train.checkpoint_every=0 steps", "train.eval_every=0 steps"]
    recipe = digits_recipe.with_overrides(
        [*lengths, f"train.{looks}_every=1 steps", "data.micro_batch_size=16"]
    )
    index = read_index(recipe.data.train)
    order = order_of(recipe, index)
    step, rank, row = next(
        (step, rank, int(np.flatnonzero(ids == 77)[0]))
        for step in range(order.steps_per_epoch)
        for rank in range(world_size)
        if 77 in (ids := order.ids_at(step, order.lanes_of(rank, world_size)))
    )
    results = run_ranks(world_size, poison, recipe.to_json(), str(tmp_path))
    text = results[0][0]
    assert f"not finite at step {step + 1}, first on rank {rank} in micro-batch {row // 16} (samples" in text
    assert index.place(77) in text
    assert text.count("digits-train") == 16
    assert "optim.lr=0.1" in text
    assert all(result[0] == text for result in results)  # all ranks stop together
    # A checkpoint is due at every step, but none may be saved after the bad one.
    newest = list_checkpoints(tmp_path / "checkpoints")[-1:]
    assert [int(path.name[5:]) for path in newest] == ([step] if step and looks == "checkpoint" else [])


def test_an_evaluation_that_is_not_finite_stops_the_run(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = {"eval/loss": float("nan"), "eval/samples": 1.0, "eval/bad_samples": 0.0}
    monkeypatch.setattr(loop, "evaluate", lambda *arguments: metrics)
    with pytest.raises(TrainingError, match=r"eval/loss is nan in the evaluation of step 12"):
        loop.train(digits_recipe, tmp_path, WORLD, Recorder())


def disagree(world: World, recipe_json: str) -> tuple[str, list[str]]:
    recipe, notes = Recipe.from_json(recipe_json), []
    indexes = (read_index(recipe.data.train), read_index(recipe.data.eval))
    torch.__version__ = f"9.{world.rank}"
    check_agreement(recipe, indexes, world, notes.append)
    own = recipe.with_overrides([f"optim.lr=0.{world.rank + 1}", f"seed={world.rank}"])
    if world.rank == 1:
        indexes = (indexes[1], indexes[1])
    try:
        check_agreement(own, indexes, world, notes.append)
    except TrainingError as error:
        return str(error), notes
    return "agreed", notes


def test_ranks_that_differ_are_named_before_the_start(digits_recipe: Recipe) -> None:
    results = run_ranks(2, disagree, digits_recipe.to_json())
    assert re.search("ranks 0 and 1 differ in their recipe, training index", results[0][0])
    assert re.search("ranks 1 and 0 differ in their recipe, training index", results[1][0])
    assert results[0][1] == ["rank 1 has torch 9.1, rank 0 has 9.0"]


CUDA = World(3, 1, 4, torch.device("cuda", 1))


@pytest.mark.parametrize(
    ("error", "world", "overrides", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has …"),
            CUDA,
            ["data.micro_batch_size=none"],
            "rank 3 ran out of memory on cuda:1 (CUDA out of memory): set data.micro_batch_size to less than 32, "
            "which changes what batch norm sees; or use train.precision=bf16",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            CUDA,
            ["train.precision=bf16", "data.cache=device"],
            "(CUDA out of memory): set data.micro_batch_size to less than 64, which changes what batch norm sees; "
            "or use data.cache=ram",
        ),
        (MemoryError(), CUDA, ["data.cache=ram"], "data.loader_workers=None; or use data.cache=none"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory"
            ),
            WORLD,
            [],
            "rank 0 ran out of host memory (DefaultCPUAllocator: can't allocate memory): lower data.prefetch_bytes=",
        ),
        (
            MemoryError(),
            WORLD,
            ["data.micro_batch_size=none"],
            "; or set data.micro_batch_size to less than 128, which changes what batch norm sees",
        ),
    ],
)
def test_out_of_memory_names_what_to_lower(
    digits_recipe: Recipe, error: Exception, world: World, overrides: list[str], message: str
) -> None:
    explained = out_of_memory(error, digits_recipe.with_overrides(overrides), world)
    assert explained is not None
    assert message in str(explained)
    assert out_of_memory(RuntimeError("something else"), digits_recipe, world) is None
