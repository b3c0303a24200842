"""An evaluation in shares is that of one process, to the last bit, however many shares there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet_dist.config import Recipe
from resnet_dist.data.shards.index import Index, read_index
from resnet_dist.errors import TooManyBadSamples, UserError
from resnet_dist.evaluation.job import EvaluationTask, Share, evaluate_share
from resnet_dist.evaluation.robust import Condition
from resnet_dist.evaluation.run import Result, cut, evaluate_here, join
from resnet_dist.train.checkpoint.load import load_model
from resnet_dist.train.device import chosen_precision
from resnet_dist.train.evaluate import evaluate, evaluation_loader, evaluation_order
from resnet_dist.train.loop import train
from resnet_dist.world import World
from tests.checkpoints import random_checkpoint
from tests.train.runs import Recorder

DIGITS = tuple("0123456789")
CONDITIONS = (Condition("gaussian_noise", 3), Condition("fog", 5), Condition("gaussian_noise", 5))


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory, digits_data: Path) -> EvaluationTask:
    folder, _ = random_checkpoint(tmp_path_factory.mktemp("m"), "model.name=resnet8", classes=DIGITS)
    trained = load_model(folder, torch.device("cpu"))
    return EvaluationTask(trained, str(digits_data / "eval"), "fp32", CONDITIONS, keeps_predictions=True)


@pytest.fixture(scope="session")
def index(job: EvaluationTask) -> Index:
    return read_index(job.shards)


@pytest.fixture(scope="session")
def whole(job: EvaluationTask, index: Index) -> Result:
    return evaluate_here(job, index)


@pytest.mark.parametrize("num_shares", [2, 7])
def test_any_number_of_shares_gives_the_same_bits(
    job: EvaluationTask, index: Index, whole: Result, num_shares: int
) -> None:
    num_steps = evaluation_order(index, job.trained.recipe.data).steps_per_epoch
    parts = cut(num_steps, num_shares)
    assert [step for part in parts for step in part] == list(range(num_steps))
    assert len(parts) == min(num_steps, num_shares)
    found = join(job, index, [evaluate_share(job, part) for part in parts])
    assert found.metrics == whole.metrics
    assert found.metrics["samples"] == 360
    assert found.top1 == whole.top1
    assert found.predictions is not None
    assert whole.predictions is not None
    assert found.predictions.to_bytes() == whole.predictions.to_bytes()
    assert found.predictions.ids_N.tolist() == list(range(360))


def test_it_is_what_training_would_measure(job: EvaluationTask, index: Index, whole: Result) -> None:
    with evaluation_loader(index, job.trained.recipe.data, World.single()) as loader:
        metrics = evaluate(job.trained.model, loader, World.single())
    found = whole.metrics
    assert {f"eval/{key}": value for key, value in found.items() if "robust" not in key} == metrics
    means = [found["robust/gaussian_noise"], found["robust/fog"]]
    assert found["robust/mean"] == pytest.approx(np.mean(means))


def test_no_steps_have_no_sums(job: EvaluationTask) -> None:
    share = evaluate_share(replace(job, conditions=()), range(0))
    assert (share.sums_PV4.shape, share.predictions) == ((0, 1, 4), None)


def test_bad_samples_of_all_shares_are_named(job: EvaluationTask, index: Index) -> None:
    job = replace(job, conditions=())
    shares = [Share(np.ones((1, 1, 4)), ("b: why",), None), Share(np.ones((2, 1, 4)), ("a: why",), None)]
    found = join(job, index, shares)
    assert found.bad == ["a: why", "b: why"]
    assert (found.metrics["samples"], found.metrics["bad_samples"]) == (3, 2)
    with pytest.raises(TooManyBadSamples, match="none of the 360 samples of .*; .* is a: why"):
        join(job, index, [Share(np.zeros((1, 1, 4)), ("a: why",), None)])


def test_the_precision_is_the_recipes_unless_another_is_asked_for() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert chosen_precision(None, "bf16", cpu) == ("bf16", None)
    assert chosen_precision("fp32", "bf16", cpu) == ("fp32", None)
    assert chosen_precision(None, "fp16", cuda) == ("fp16", None)
    assert chosen_precision(None, "fp16", cpu) == (
        "fp32",
        "evaluated in fp32: the recipe's train.precision='fp16' needs a GPU",
    )
    with pytest.raises(UserError, match="--precision fp16 needs a GPU; use bf16 or fp32"):
        chosen_precision("fp16", "bf16", cpu)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_evaluates_in_the_recipes_precision(
    digits_recipe: Recipe, tmp_path: Path, precision: str
) -> None:
    recipe = digits_recipe.with_overrides([f"train.precision={precision}", "train.length=3 steps"])
    outcome = train(recipe, tmp_path, World.single(), Recorder())
    trained = load_model(tmp_path, torch.device("cpu"))
    index = read_index(recipe.data.eval)
    losses = {
        name: evaluate_here(EvaluationTask(trained, recipe.data.eval, name), index).metrics["loss"]  # type: ignore[arg-type]
        for name in ("fp32", "bf16")
    }
    assert losses[precision] == outcome.metrics["eval/loss"]
    assert losses["fp32"] != losses["bf16"]
