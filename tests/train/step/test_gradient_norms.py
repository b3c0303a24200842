"""Gradient norms: what is measured, when, and that measuring changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resnet_dist.config import Recipe
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.images.augment import normalize
from resnet_dist.data.shards.index import read_index
from resnet_dist.train import loop
from resnet_dist.train.plan import order_of
from resnet_dist.train.start.initial import initial_state
from resnet_dist.train.step.gradient_norms import GradientNorms
from resnet_dist.world import World
from tests.train.runs import Recorder

WORLD = World.single()


def train(recipe: Recipe, folder: Path) -> Recorder:
    recorder = Recorder()
    assert loop.train(recipe, folder, WORLD, recorder).finished
    return recorder


def test_norms_of_the_first_step_by_hand(digits_recipe: Recipe, tmp_path: Path) -> None:
    recipe = digits_recipe.with_overrides(["train.log_gradient_norms=true", "train.log_every=1 steps"])
    model = initial_state(recipe, 10, WORLD).model
    index = read_index(recipe.data.train)
    with Loader(index, order_of(recipe, index), recipe.data, WORLD, seed=recipe.seed) as loader:
        batch = loader.batch_at(0)
    for half in (slice(0, 64), slice(64, 128)):  # the micro-batches: batch norm sees each on its own
        logits = model(normalize(batch.images_BSSC[half], recipe.data))
        (F.cross_entropy(logits, batch.labels_B[half]) / 2).backward()
    by_hand = {
        name: module.weight.grad.square().sum().sqrt().item()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    assert next(iter(by_hand)) == "conv1"
    assert min(by_hand.values()) > 0
    first = train(recipe.with_overrides(["train.length=1 steps"]), tmp_path).norms[1]
    assert list(first) == list(by_hand)
    assert first == pytest.approx(by_hand, rel=1e-4)


def test_measured_at_log_steps_only_and_nothing_else_changes(digits_recipe: Recipe, tmp_path: Path) -> None:
    recipe = digits_recipe.with_overrides(["train.length=12 steps"])
    without = train(recipe, tmp_path / "without")
    measured = train(recipe.with_overrides(["train.log_gradient_norms=true"]), tmp_path / "with")
    assert without.norms == {}
    assert list(measured.norms) == [5, 10, 12]
    assert measured.metrics == without.metrics


def test_a_layer_without_a_gradient_has_norm_zero() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.Conv2d(1, 1, 3, bias=False))
    model[1].weight.grad = torch.full((1, 1, 3, 3), 2.0)
    norms = GradientNorms(model)
    norms.measure()
    assert norms.read() == {"0": 0.0, "1": 6.0}
    norms.measure(loss_scale=4.0)
    assert norms.read() == {"0": 0.0, "1": 1.5}
