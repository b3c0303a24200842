"""The threads of a rank: by the work of a step, and for a run that is resumed those that it began with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from resnet_dist.config import Recipe
from resnet_dist.launch.attempt import Attempt
from resnet_dist.launch.rank import threads_of
from resnet_dist.train.start.threads import choose_threads, work_per_layer
from resnet_dist.world import World


def test_the_work_is_that_of_layers_which_multiply_by_weights() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 10))
    convolution, linear = 6 * 4 * 25 * 2 * 9, 6 * 10 * 100
    assert work_per_layer(net, channels=2, size=5, batch=6) == (convolution + linear) / 2


@pytest.mark.parametrize(
    ("overrides", "ranks", "cpus", "threads"),
    [
        ((), 1, 64, 1),  # digits: 64 images of 8x8
        (("model.name=resnet50", "data.image_size=224"), 1, 64, 64),
        (("model.name=resnet50", "data.image_size=224"), 1, 2, 2),
        # The images of a forward pass count, however many ranks share a step.
        (("data.image_size=32", "data.micro_batch_size=128"), 1, 64, 4),
        (("data.image_size=32", "data.micro_batch_size=none"), 1, 64, 4),
        (("data.image_size=32", "data.micro_batch_size=none"), 2, 64, 2),
    ],
)
def test_small_nets_have_one_thread_and_large_ones_all(
    digits_recipe: Recipe, overrides: tuple[str, ...], ranks: int, cpus: int, threads: int
) -> None:
    recipe = digits_recipe.with_overrides(["model.name=resnet20", *overrides])
    assert choose_threads(recipe, ranks, cpus) == threads


def test_the_recipe_then_the_run_then_the_work_decides(digits_recipe: Recipe) -> None:
    attempt = Attempt(digits_recipe.to_json(), "/nowhere", cpus=8, number=2, token="t", host="here")
    cpu, gpu = World.single(), replace(World.single(), device=torch.device("cuda", 0))
    assert threads_of(attempt, digits_recipe, cpu) == 1
    assert threads_of(attempt, digits_recipe, gpu) == 8
    begun = replace(attempt, threads=4)
    assert threads_of(begun, digits_recipe, cpu) == 4
    assert threads_of(replace(begun, cpus=2), digits_recipe, cpu) == 2
    assert threads_of(begun, digits_recipe.with_overrides(["train.threads=3"]), cpu) == 3
