"""A run of the GPU's measurements begins like a fresh one, whatever its state has been trained to before."""

from __future__ import annotations

import pytest
import torch

from resnet_dist.config import Recipe
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.shards.index import read_index
from resnet_dist.train.plan import Plan, order_of
from resnet_dist.train.start.initial import initial_state
from resnet_dist.train.step.train_step import TrainStep
from resnet_dist.world import World
from tests.benchmarks.gpu.fast import restore


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "adamw", "lamb"])
def test_what_is_restored_trains_as_a_new_state(digits_recipe: Recipe, optimizer: str) -> None:
    recipe = digits_recipe.with_overrides([f"optim.optimizer={optimizer}", "train.ema_decay=0.9"])
    index, world = read_index(recipe.data.train), World.single()
    order = order_of(recipe, index)
    with Loader(index, order, recipe.data, world, seed=0) as loader:
        batches = [loader.batch_at(step) for step in range(3)]

    def trained(state, step):  # type: ignore[no-untyped-def]
        for batch in batches:
            step(batch)
            state.step += 1
        return state.tensors()

    plan, first = Plan.of(recipe, order), initial_state(recipe, len(index.classes), world)
    tensors = {
        file: {name: t.clone() for name, t in group.items()} for file, group in first.tensors().items()
    }
    scalars, state = first.scalars(), initial_state(recipe, len(index.classes), world)
    step = TrainStep(state, recipe, plan, world)
    trained(state, step)
    restore(state, tensors, scalars, world)
    again = trained(state, step)
    expected = trained(first, TrainStep(first, recipe, plan, world))
    assert again["optimizer"].keys() == expected["optimizer"].keys()
    for file in ("model", "raw", "optimizer"):
        for name, value in expected[file].items():
            assert torch.equal(again[file][name], value), name
