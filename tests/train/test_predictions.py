"""The predictions of an evaluation: each sample once, on any number of ranks, and the metrics stay what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from resnet_dist.config import Recipe
from resnet_dist.data.shards.index import read_index
from resnet_dist.train import loop
from resnet_dist.train.evaluate import evaluate, evaluation_loader
from resnet_dist.train.predictions import MAX_WORST, PredictionLog, Predictions, joined
from resnet_dist.world import World
from tests.train.ranks import run_ranks
from tests.train.runs import Recorder


class Lines(nn.Module):
    """A model whose logits are the means of the rows of an image: enough to be right and wrong."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.mean(dim=(1, 3))
        return torch.cat([rows, rows[:, :2]], dim=1) * 4


def found_by(world: World, recipe_json: str) -> tuple[dict[str, float], dict[str, float], bytes]:
    recipe, log = Recipe.from_json(recipe_json), PredictionLog()
    with evaluation_loader(read_index(recipe.data.eval), recipe.data, world) as loader:
        metrics = evaluate(Lines(), loader, world, predictions=log)
        return metrics, evaluate(Lines(), loader, world), log.gather(world).to_bytes()


def test_every_sample_is_there_once_on_any_number_of_ranks(digits_recipe: Recipe) -> None:
    text = digits_recipe.to_json()
    metrics, plain, content = found_by(World.single(), text)
    assert metrics == plain
    found = Predictions.from_bytes(content)
    assert found.ids_N.tolist() == list(range(360))
    assert np.mean(found.labels_N == found.predictions_N) == pytest.approx(metrics["eval/top1"])
    losses = -np.log(found.label_probabilities_N.astype(np.float64))
    assert losses.mean() == pytest.approx(metrics["eval/loss"], rel=1e-5)
    wrong = np.flatnonzero(found.labels_N != found.predictions_N)
    assert len(wrong) > MAX_WORST == len(found.worst_K)
    rest = np.setdiff1d(wrong, found.worst_K)
    assert found.label_probabilities_N[found.worst_K].max() <= found.label_probabilities_N[rest].min()
    assert np.all(np.diff(found.label_probabilities_N[found.worst_K]) >= 0)
    with evaluation_loader(read_index(digits_recipe.data.eval), digits_recipe.data, World.single()) as loader:
        batches = [loader.batch_at(step) for step in range(loader.order.steps_per_epoch)]
        images = {
            number: batch.images_BSSC[row].numpy().copy()
            for batch in batches
            for row, number in enumerate(batch.ids_B.tolist())
        }
    for place, image in zip(found.worst_K, found.images_KSSC, strict=True):
        assert np.array_equal(image, images[int(found.ids_N[place])])
    for _, _, of_ranks in run_ranks(2, found_by, text):
        assert of_ranks == content


def saturated(ids: range) -> Predictions:
    """Return predictions that are all wrong, with label probabilities that float32 cannot subtract from 1."""
    log = PredictionLog()
    for low in range(ids.start, ids.stop, 8):
        own = np.arange(low, low + 8)
        logits = torch.zeros(8, 10)
        logits[:, 0] = torch.from_numpy(20.0 + own % 7)
        images = torch.from_numpy(own.astype(np.uint8)).reshape(8, 1, 1, 1)
        log.add(logits, torch.ones(8, dtype=torch.int64), torch.ones(8), own, images)
    return log.gather(World.single())


def test_the_worst_of_saturated_logits_are_the_same_in_any_shares() -> None:
    whole = saturated(range(96))
    by_loss = sorted(range(96), key=lambda number: (-(number % 7), number))[:MAX_WORST]
    assert whole.ids_N[whole.worst_K].tolist() == by_loss
    assert whole.images_KSSC[:, 0, 0, 0].tolist() == by_loss
    parts = [saturated(range(low, high)) for low, high in ((0, 40), (40, 48), (48, 96))]
    assert joined(parts).to_bytes() == whole.to_bytes()


@pytest.mark.parametrize(("figures", "expected"), [("none", []), ("end", [4]), ("evaluations", [2, 4])])
def test_they_are_recorded_where_the_recipe_asks(
    figures: str, expected: list[int], digits_recipe: Recipe, tmp_path: Path
) -> None:
    steps = []

    class Steps(Recorder):
        def log_predictions(self, predictions: Predictions, step: int) -> None:
            steps.append(step)
            assert len(predictions.ids_N) == 360

    recipe = digits_recipe.with_overrides(
        [f"train.figures={figures}", "train.length=4 steps", "train.eval_every=2 steps"]
    )
    loop.train(recipe, tmp_path, World.single(), Steps())
    assert steps == expected
