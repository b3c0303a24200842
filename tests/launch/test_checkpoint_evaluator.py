"""The evaluation of checkpoints outside the ranks: what a person must know comes with the metrics."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from resnet_dist.config import Recipe
from resnet_dist.errors import TrainingError
from resnet_dist.launch import checkpoint_evaluator
from resnet_dist.train import predictions


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the bad samples of evaluations that take no time; a test adds them."""
    bad: list[str] = []

    def evaluate(*given: Any, report_bad: Callable[[list[str]], None], **options: Any) -> dict[str, float]:
        report_bad(bad)
        return {"eval/loss": 0.5, "eval/samples": 360.0 - len(bad), "eval/bad_samples": float(len(bad))}

    monkeypatch.setattr(checkpoint_evaluator, "evaluate", evaluate)
    monkeypatch.setattr(
        checkpoint_evaluator, "load_model", lambda *given, **options: SimpleNamespace(model=None, step=4)
    )
    return bad


def test_bad_samples_and_missing_figures_are_named(
    digits_recipe: Recipe, bad: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "MAX_SAMPLES", 100)
    bad.append("shard/7: no image")
    recipe = digits_recipe.with_overrides(["train.figures=evaluations", "data.max_bad_fraction=0.5"])
    found = checkpoint_evaluator.CheckpointEvaluator(recipe, 1, gpu=False)
    metrics, kept, lines = found.evaluate("x")
    assert metrics["eval/bad_samples"] == 1
    assert kept is None
    assert lines == [
        "no figures of an evaluation with 360 samples: at most 100 are kept",
        "bad evaluation sample shard/7: no image",
    ]
    found.close()


def test_another_precision_is_named_once(digits_recipe: Recipe, bad: list[str]) -> None:
    recipe = digits_recipe.with_overrides(["train.precision=fp16", "train.figures=none"])
    found = checkpoint_evaluator.CheckpointEvaluator(recipe, 1, gpu=False)
    assert [found.evaluate("x")[2] for _ in range(2)] == [
        ["evaluated in fp32: the recipe's train.precision='fp16' needs a GPU"],
        [],
    ]
    found.close()


def test_too_many_bad_samples_are_refused_by_name(digits_recipe: Recipe, bad: list[str]) -> None:
    bad += ["shard/7: no image"] * 200
    recipe = digits_recipe.with_overrides(["train.figures=none"])
    found = checkpoint_evaluator.CheckpointEvaluator(recipe, 1, gpu=False)
    with pytest.raises(TrainingError, match=r"^200 samples could not .*; the first is shard/7: no image$"):
        found.evaluate("x")
    found.close()
