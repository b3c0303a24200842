"""Runs of one recipe on one, two and four ranks draw the same curve."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from resnet_dist.config import Recipe
from resnet_dist.data.images.augment import normalize
from resnet_dist.data.shards.index import read_index
from resnet_dist.train import evaluate as evaluate
from resnet_dist.train import loop
from resnet_dist.train.plan import Plan, order_of
from resnet_dist.train.step import train_step as step
from resnet_dist.world import World
from tests.train.ranks import run_ranks
from tests.train.runs import Recorder

STEPS = 14  # an epoch has eleven
# With sums in float32, rounding flips a ReLU after some steps, and the curves part.
EXACT = "train.gradient_sums=fp64"


def train_rank(world: World, recipe_json: str, folder: str) -> tuple[list[float], int]:
    log = Recorder()
    outcome = loop.train(Recipe.from_json(recipe_json), Path(folder), world, log)
    return log.curve, outcome.step


def train_rank_in_double(world: World, recipe_json: str, folder: str) -> tuple[list[float], int]:
    """Train in float64 wherever a recipe trains in float32."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    for module in (step, evaluate):
        module.normalize = functools.partial(normalize, dtype=torch.float64)  # type: ignore[attr-defined]
    return train_rank(world, recipe_json, folder)


def curve(world_size: int, recipe: Recipe, folder: Path, *, double: bool = False) -> list[float]:
    """Return every training and evaluation loss of a run; assert that all ranks have the same."""
    function = train_rank_in_double if double else train_rank
    results = run_ranks(world_size, function, recipe.to_json(), str(folder))
    assert all(result == results[0] for result in results), results
    losses, steps = results[0]
    order = order_of(recipe, read_index(recipe.data.train))
    assert steps == Plan.of(recipe, order).total
    return list(losses)


@pytest.fixture
def recipe(digits_recipe: Recipe) -> Recipe:
    lengths = [f"train.length={STEPS} steps", "train.log_every=1 steps", "train.eval_every=7 steps"]
    return digits_recipe.with_overrides(
        [*lengths, "data.micro_batch_size=32", "data.crop=pad-crop", "data.pad=1"]
    )


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ranks_draw_the_same_curve_in_double_precision(recipe: Recipe, tmp_path: Path) -> None:
    """Only the order of summation differs, by 1e-16 a step and growing, over the whole run."""
    whole = recipe.with_overrides(["train.length=4 epochs", "train.eval_every=1 epochs"])
    one = curve(1, whole, tmp_path / "one", double=True)
    assert len(one) == 4 * 11 + 4
    assert one[-2] < 0.5 * one[0]
    for world_size in (2, 4):
        other = curve(world_size, whole, tmp_path / str(world_size), double=True)
        assert other == pytest.approx(one, rel=1e-8)


@pytest.mark.timeout(900)
def test_ranks_draw_the_same_curve_bitwise_where_gradients_are_summed_exactly(
    recipe: Recipe, tmp_path: Path
) -> None:
    """This holds in float32, at the full rate of the digits job."""
    fifty = recipe.with_overrides(
        ["train.length=50 steps", "train.eval_every=0 steps", "data.crop=none", "data.pad=0"]
    )
    exact = fifty.with_overrides([EXACT])
    *one, evaluation = curve(1, exact, tmp_path / "one")
    assert len(one) == 50
    for world_size in (2, 4):
        *other, its_evaluation = curve(world_size, exact, tmp_path / str(world_size))
        assert other == one
        # Running statistics are means over ranks, which round differently.
        assert its_evaluation == pytest.approx(evaluation, rel=1e-3)
    plain = curve(1, fifty, tmp_path / "plain")
    assert plain[:3] == pytest.approx(one[:3], rel=1e-4)  # the same gradients, except for rounding


@pytest.mark.timeout(900)
def test_ranks_draw_the_same_curve(recipe: Recipe, tmp_path: Path) -> None:
    """The rate is small here: in float32 rounding moves activations over the kink of a ReLU, and the effect of each
    such jump of a gradient grows with the rate. A run on one rank with weights moved by 1e-7 differs as much.
    """
    lengths = ["train.length=50 steps", "train.eval_every=25 steps"]
    fifty = recipe.with_overrides([*lengths, "optim.lr=0.003"])
    one = curve(1, fifty, tmp_path / "one")
    assert len(one) == 52
    assert one[-2] < 0.95 * one[0]  # it learns at this rate too
    for world_size in (2, 4):
        assert curve(world_size, fifty, tmp_path / str(world_size)) == pytest.approx(one, rel=1e-3)


def test_a_run_continues_on_another_number_of_ranks(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.with_overrides([EXACT])
    whole = curve(1, recipe, tmp_path / "whole")
    log, calls = Recorder(), iter(range(100))
    torch.set_num_threads(1)
    stopped = loop.train(recipe, tmp_path / "moved", World.single(), log, lambda: next(calls) == 5)
    assert stopped.step == 6
    rest = curve(2, recipe, tmp_path / "moved")
    assert log.curve + rest == pytest.approx(whole, rel=1e-4)


def stop_rank(world: World, recipe_json: str, folder: str) -> int:
    calls = iter(range(100))
    recipe = Recipe.from_json(recipe_json)
    return loop.train(recipe, Path(folder), world, Recorder(), lambda: next(calls) == 5).step


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_run_moves_within_a_log_interval(recipe: Recipe, tmp_path: Path, world_size: int) -> None:
    """The checkpoint holds the sums of two ranks since the last log line; other ranks continue with them."""
    recipe = recipe.with_overrides(["train.log_every=10 steps", EXACT])
    whole = curve(2, recipe, tmp_path / "whole")
    assert len(whole) == 4  # training at 10 and 14, evaluation at 7 and 14
    assert run_ranks(2, stop_rank, recipe.to_json(), str(tmp_path / "moved")) == [7, 7]
    rest = curve(world_size, recipe, tmp_path / "moved")
    # The run stopped during the evaluation of step 7, or right after it.
    assert rest == pytest.approx(whole[-len(rest) :], rel=0 if world_size == 2 else 1e-4)
    assert len(rest) in (3, 4)


@pytest.mark.long
def test_mixing_policies_and_caches_draw_the_same_curve_on_two_ranks(recipe: Recipe, tmp_path: Path) -> None:
    everything = [
        "data.mixup=0.4",
        "data.cutmix=1.0",
        "data.flip=true",
        "data.policy=trivial-augment",
        "data.color_jitter=0.3",
        "data.erase=0.25",
    ]
    recipe = recipe.with_overrides([EXACT])
    augmented = recipe.with_overrides(everything)
    one = curve(1, augmented, tmp_path / "one")
    assert one != pytest.approx(curve(1, recipe, tmp_path / "plain"), rel=1e-2)
    cached = augmented.with_overrides(["data.cache=ram"])
    assert curve(1, cached, tmp_path / "cached") == one
    two = curve(2, augmented, tmp_path / "two")
    assert curve(2, cached, tmp_path / "both") == two
    assert two == pytest.approx(one, rel=1e-4)


def test_gradient_norms_are_the_same_on_two_ranks(recipe: Recipe, tmp_path: Path) -> None:
    measured = recipe.with_overrides(["train.log_gradient_norms=true", EXACT])
    one = curve(1, measured, tmp_path / "one")
    assert len(one) == STEPS * (1 + 9) + 2  # resnet8 has seven convolutions, and two projections
    assert curve(2, measured, tmp_path / "two") == pytest.approx(one, rel=1e-4)


def test_moving_sizes_and_repeats_draw_the_same_curve_on_two_ranks(recipe: Recipe, tmp_path: Path) -> None:
    features = [
        'data.train_sizes=[["0 epochs", 6], ["0.5 epochs", 7], ["1 epochs", 8]]',
        "data.repeats=2",
        "data.mixup=0.2",
        "data.flip=alternate",
        "data.eval_flip=true",
        "data.eval_shift=1",
        "data.eval_confidence=0.6",
        *("train.ema_decay=0.9", "train.ema_every=2 steps", "train.ema_rise=1", "train.ema_replaces=true"),
        "data.eval_size=9",
        EXACT,
    ]
    changed = recipe.with_overrides(features)
    one = curve(1, changed, tmp_path / "one")
    assert one != pytest.approx(curve(1, recipe, tmp_path / "plain"), rel=1e-2)
    assert curve(2, changed, tmp_path / "two") == pytest.approx(one, rel=1e-4)
