"""Trials at the same time: as many as have a CPU or a GPU, and memory."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_dist.bench import scale
from resnet_dist.config import Recipe
from resnet_dist.errors import UserError
from resnet_dist.launch.on_ray.placement.fit import Node
from resnet_dist.model import build_model, count_parameters
from resnet_dist.sweep import room
from resnet_dist.sweep.request import SweepRequest
from resnet_dist.sweep.room import activation_bytes, find_room, memory_of_rank
from resnet_dist.sweep.search import read_searches
from resnet_dist.tracking.mlflow.logged import card

TEXTS = ("optim.lr=log:0.01..1",)


@pytest.fixture
def request_of(digits_recipe: Recipe, tmp_path: Path) -> SweepRequest:
    searches = read_searches(TEXTS, digits_recipe)
    return SweepRequest(digits_recipe, digits_recipe, "digits.py", tmp_path, TEXTS, searches, 8, gpu=False)


def on(monkeypatch: pytest.MonkeyPatch, *free: float, cpus: float = 4) -> None:
    """Let the cluster have a node with so many CPUs for each number of free bytes."""
    alive = [Node(cpus, 0, f"h{number}", f"id-{number}", has) for number, has in enumerate(free)]
    monkeypatch.setattr(room, "nodes", lambda: alive)
    monkeypatch.setattr(room, "memory_of_rank", lambda recipe, workers, gpu: 2e9)


def test_a_trial_that_does_not_fit_into_memory_waits(
    request_of: SweepRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [request_of.recipe] * 8
    on(monkeypatch, 64e9)
    assert find_room(request_of, recipes) == room.Room(4, 1, 1, gpu=False, memory=2_000_000_000)
    on(monkeypatch, 5e9, 3e9)
    found = find_room(request_of, recipes)
    assert (found.concurrent, found.cpus) == (3, 2)
    assert found.of_actor() == {"CPU": 2, "memory": 2_000_000_000}
    assert found.limit == (
        "memory for 3 of 8 trial(s) at a time: each takes some 2.0 GB, and 8.0 GB are free; the others wait"
    )
    assert find_room(replace(request_of, concurrent=5), recipes).concurrent == 3
    assert find_room(replace(request_of, workers=2), recipes).concurrent == 1


def test_one_trial_is_tried_where_none_fits(
    request_of: SweepRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, 1e9)
    found = find_room(request_of, [request_of.recipe] * 8)
    assert (found.concurrent, found.memory) == (1, 1_000_000_000)
    assert found.limit.endswith("and 1.0 GB are free; one is tried alone")


def test_what_is_free_on_this_machine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory", lambda: 3_000_000_000)
    assert room.free_memory(Node(4, 0, platform.node(), "a", 64e9)) == 3e9
    assert room.free_memory(Node(4, 0, platform.node(), "a", 2e9)) == 2e9
    assert room.free_memory(Node(4, 0, "other", "b", 64e9)) == 64e9


def test_more_at_the_same_time_than_cpus_is_a_mistake(
    request_of: SweepRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, 64e9)
    with pytest.raises(UserError, match="--concurrent 5: each trial needs 1 rank"):
        find_room(replace(request_of, concurrent=5), [request_of.recipe])


def test_the_layers_of_a_network_put_out_so_many_bytes() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    assert activation_bytes(network, 3, 8) == 4 * (256 + 256 + 256 + 2)
    assert next(network.parameters()).device == torch.device("meta")


def test_a_network_that_leaves_one_pixel_of_an_image_is_counted_too() -> None:
    deep = build_model("resnet18", in_channels=1, num_classes=10, seed=0)
    assert activation_bytes(deep, 1, 8) > 4 * 512


def test_a_network_is_counted_without_its_weights(
    digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a large one take gigabytes, and seconds."""
    modules, built = (room, scale, card), list[nn.Module]()

    def build(*arguments: object, **options: object) -> nn.Module:
        built.append(build_model(*arguments, **options))  # type: ignore[arg-type]
        return built[-1]

    for module in modules:
        monkeypatch.setattr(module, "build_model", build)
    recipe = digits_recipe.with_overrides(["model.name=resnet8"])
    memory_of_rank(recipe, 1, gpu=False)
    fast = recipe.with_overrides(["model.name=resnet9_fast", "data.image_size=12"])
    assert scale.checkpoint_bytes(fast, num_classes=10) > 4 * count_parameters(built[-1])
    text = card.card(recipe, [str(label) for label in range(10)], 1, {}, [])
    assert {parameter.device.type for network in built for parameter in network.parameters()} == {"meta"}
    real = build_model("resnet8", in_channels=recipe.data.channels, num_classes=10)
    assert f"{count_parameters(real):,} parameters" in text
    assert len(built) == len(modules)


def test_what_takes_memory_counts(digits_recipe: Recipe) -> None:
    recipe = digits_recipe.with_overrides(["data.micro_batch_size=none"])
    small = memory_of_rank(recipe, 1, gpu=False)
    assert small < 1.5e9
    for change in ("model.name=resnet110", "data.image_size=64", "data.global_batch_size=512"):
        assert memory_of_rank(recipe.with_overrides([change]), 1, gpu=False) > small
    assert memory_of_rank(recipe, 2, gpu=False) < small
    assert memory_of_rank(recipe, 1, gpu=True) < small
    large = build_model("resnet50", in_channels=3, num_classes=1000, seed=0)
    assert 80e6 < activation_bytes(large, 3, 224) < 140e6
