"""Training and evaluation with the recipe's sizes, repeats and mirrors, on real digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resnet_dist.config import Recipe
from resnet_dist.data.index import read_index
from resnet_dist.data.loader import Loader
from resnet_dist.evaluate import evaluate, evaluation_loader
from resnet_dist.train import loop
from resnet_dist.train.checkpoint import list_checkpoints, read_checkpoint
from resnet_dist.world import World

WORLD = World.single()
MOVING = [
    'data.train_sizes=[["0 epochs", 6], ["0.5 epochs", 7], ["1 epochs", 8]]',
    "data.crop=pad-crop",
    "data.pad=1",
]
EVERYTHING = [*MOVING, "data.repeats=2", "data.flip=alternate", "data.eval_flip=true", "data.eval_size=9"]


class Silent:
    def log(self, metrics: dict[str, float], step: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def weights(folder: Path) -> dict[str, Tensor]:
    tensors, _ = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    return {name: value.clone() for name, value in tensors["model"].items()}


@pytest.mark.parametrize("cache", [[], ["data.cache=ram"]])
def test_stopped_anywhere_and_resumed_equals_uninterrupted_bitwise(
    digits_recipe: Recipe, tmp_path: Path, cache: list[str]
) -> None:
    recipe = digits_recipe.with_overrides([*EVERYTHING, *cache, "train.length=14 steps"])
    whole = loop.train(recipe, tmp_path / "whole", WORLD, Silent())
    for stop_after in (5, 1, 3):  # before, at and after a change of size; at an epoch's end
        calls = iter(range(100))
        loop.train(
            recipe, tmp_path / "parts", WORLD, Silent(), lambda n=stop_after, c=calls: next(c) == n - 1
        )
    parts = loop.train(recipe, tmp_path / "parts", WORLD, Silent())
    assert (whole.step, parts.step) == (14, 14)
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
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
    loop.train(recipe, tmp_path, WORLD, Silent())
    assert [size for size, training in seen if training] == [6] * 6 + [7] * 5 + [8] * 3
    assert {size for size, training in seen if not training} == {10}


class Lopsided(nn.Module):
    """Sees more on the left."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
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
