"""Training and evaluation with the recipe's sizes, repeats and mirrors, on real digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_dist.config import Recipe
from resnet_dist.data.batches.loader import Batch, Loader
from resnet_dist.data.shards.index import read_index
from resnet_dist.errors import TooManyBadSamples
from resnet_dist.train import loop
from resnet_dist.train.evaluate import evaluate, evaluation_loader
from resnet_dist.train.tracker import NullTracker
from resnet_dist.world import World
from tests.train.ranks import run_ranks
from tests.train.runs import assert_same

WORLD = World.single()
MOVING = [
    'data.train_sizes=[["0 epochs", 6], ["0.5 epochs", 7], ["1 epochs", 8]]',
    "data.crop=pad-crop",
    "data.pad=1",
]
EVERYTHING = [
    *MOVING,
    "data.repeats=2",
    "data.flip=alternate",
    "data.eval_flip=true",
    "data.eval_size=9",
    "data.eval_shift=1",
]


@pytest.mark.parametrize("cache", [[], ["data.cache=ram"]])
def test_stopped_anywhere_and_resumed_equals_uninterrupted_bitwise(
    digits_recipe: Recipe, tmp_path: Path, cache: list[str]
) -> None:
    recipe = digits_recipe.with_overrides([*EVERYTHING, *cache, "train.length=14 steps"])
    whole = loop.train(recipe, tmp_path / "whole", WORLD, NullTracker())
    for stop_after in (5, 1, 3):  # before, at and after a change of size, and at an epoch's end
        calls = iter(range(100))
        loop.train(
            recipe,
            tmp_path / "parts",
            WORLD,
            NullTracker(),
            lambda n=stop_after, c=calls: next(c) == n - 1,
        )
    parts = loop.train(recipe, tmp_path / "parts", WORLD, NullTracker())
    assert (whole.step, parts.step) == (14, 14)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    assert parts.metrics["eval/samples"] == whole.metrics["eval/samples"] == 360
    assert parts.metrics["eval/loss"] == whole.metrics["eval/loss"]


def test_the_model_sees_the_sizes_of_the_plan_and_of_evaluation(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []
    original = Loader.batch_at

    def batch_at(self: Loader, step: int) -> object:
        batch = original(self, step)
        seen.append((batch.images_BSSC.shape[1], self.order.training))
        return batch

    monkeypatch.setattr(Loader, "batch_at", batch_at)
    recipe = digits_recipe.with_overrides([*MOVING, "data.eval_size=10", "train.length=14 steps"])
    loop.train(recipe, tmp_path, WORLD, NullTracker())
    assert [size for size, training in seen if training] == [6] * 6 + [7] * 5 + [8] * 3
    assert {size for size, training in seen if not training} == {10}


class Lopsided(nn.Module):
    """A model that gives another answer for a mirrored image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(images.flatten(1))
        return logits


def test_mirrors_are_averaged_and_samples_counted_once(digits_recipe: Recipe) -> None:
    index = read_index(digits_recipe.data.eval)
    model = Lopsided()
    both = digits_recipe.data.model_copy(update={"eval_flip": True})
    with evaluation_loader(index, both, WORLD) as loader:
        found = evaluate(model, loader, WORLD)
    with evaluation_loader(index, digits_recipe.data, WORLD) as loader:
        plain = evaluate(model, loader, WORLD)
        mean = nn.Linear(64, 10)
        mirrored = model.head.weight.reshape(10, 8, 8).flip(-1).reshape(10, 64)
        mean.weight, mean.bias = nn.Parameter((model.head.weight + mirrored) / 2), model.head.bias
        expected = evaluate(nn.Sequential(nn.Flatten(), mean), loader, WORLD)
    assert found["eval/samples"] == plain["eval/samples"] == 360
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["eval/loss"] != pytest.approx(plain["eval/loss"], rel=1e-3)


class Pooled(Lopsided):
    """A model that writes into the same memory at every call, as a CUDA graph does, by batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[int, torch.Tensor] = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        return self.memory.setdefault(len(images), torch.empty_like(logits)).copy_(logits)


def test_mirrors_are_averaged_where_a_graph_overwrites_its_logits(digits_recipe: Recipe) -> None:
    index = read_index(digits_recipe.data.eval)
    data = digits_recipe.data.model_copy(update={"eval_flip": True})
    with evaluation_loader(index, data, WORLD) as loader:
        assert evaluate(Pooled(), loader, WORLD) == evaluate(Lopsided(), loader, WORLD)


def test_evaluation_has_as_many_samples_in_a_pass_as_training(digits_recipe: Recipe) -> None:
    index = read_index(digits_recipe.data.eval)
    found, sizes = [], []
    for micro_batch_size in (None, 16):
        data = digits_recipe.data.model_copy(update={"micro_batch_size": micro_batch_size})
        model = Pooled()
        with evaluation_loader(index, data, WORLD) as loader:
            found.append(evaluate(model, loader, WORLD))
        sizes.append(set(model.memory))
    assert sizes == [{128}, {16}]
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def evaluate_with_bad_samples(
    world: World, recipe_json: str, every: int
) -> tuple[dict[str, float], list[str]]:
    """Evaluate a set in which one sample of `every` cannot be decoded; return the metrics and the reports."""
    index = read_index(Recipe.from_json(recipe_json).data.eval)
    original, notes = Loader.batch_at, []

    def batch_at(self: Loader, step: int) -> Batch:
        batch = original(self, step)
        rows = [row for row, i in enumerate(batch.ids_B.tolist()) if i >= 0 and i % every == 0]
        batch.weights_B[rows] = 0
        return replace(batch, bad=tuple(f"{index.place(batch.ids_B[row])}: torn" for row in rows))

    Loader.batch_at = batch_at  # type: ignore[method-assign]
    try:
        with evaluation_loader(index, Recipe.from_json(recipe_json).data, world) as loader:
            return evaluate(Lopsided(), loader, world, report_bad=notes.extend), notes
    finally:
        Loader.batch_at = original  # type: ignore[method-assign]


def test_bad_samples_of_an_evaluation_are_counted_and_named_on_any_number_of_ranks(
    digits_recipe: Recipe,
) -> None:
    arguments = (digits_recipe.to_json(), 30)
    metrics, names = evaluate_with_bad_samples(WORLD, *arguments)
    assert (metrics["eval/samples"], metrics["eval/bad_samples"]) == (348, 12)
    assert len(names) == 12
    assert all(name.startswith("digits-eval-0") and name.endswith(": torn") for name in names)
    for its_metrics, its_names in run_ranks(2, evaluate_with_bad_samples, *arguments):
        assert its_metrics == pytest.approx(metrics, rel=1e-6)
        assert its_names == names


def test_an_evaluation_without_a_good_sample_is_an_error(digits_recipe: Recipe) -> None:
    with pytest.raises(
        TooManyBadSamples, match=r"none of the 360 samples of .* can be evaluated; the first .*: torn"
    ):
        evaluate_with_bad_samples(WORLD, digits_recipe.to_json(), 1)
