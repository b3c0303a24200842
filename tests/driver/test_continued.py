"""A longer run of constant rate: lengths in percent of it must not move what has begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.config import Recipe
from resnet_dist.data.shards.index import Index, read_index
from resnet_dist.driver.preflight import check_continued
from resnet_dist.errors import UserError
from resnet_dist.runs.choose import choose_run

CONSTANT = ["schedule.decay=constant", "schedule.warmup=0 steps", "train.length=24 steps"]
AVERAGED = ["train.ema_decay=0.9"]


def continued(recipe: Recipe, begun: list[str], now: list[str], output: Path) -> None:
    """Begin a run with some overrides, and check whether it may be continued with others."""
    before = recipe.with_overrides([*CONSTANT, *begun])
    after = before.with_overrides(now)
    index: Index = read_index(recipe.data.train)
    choose_run(output, before, "x", resume=False).write()
    check_continued(choose_run(output, after, "x", resume=True), after, index)


@pytest.mark.parametrize(
    ("begun", "now", "moved"),
    [
        (
            ["schedule.warmup=10 percent"],
            ["train.length=90 steps"],
            "schedule.warmup from 2 steps to 9 steps",
        ),
        (["schedule.warmup=50%"], ["train.length=2 epochs"], "schedule.warmup from 12 steps to 11 steps"),
        (
            [*AVERAGED, "train.ema_every=25 percent"],
            ["train.length=48 steps"],
            "train.ema_every from 6 steps to 12 steps",
        ),
        (
            ['data.train_sizes=[["0 steps", 4], ["50 percent", 8]]'],
            ["train.length=30 steps"],
            "data.train_sizes from 4 pixels at step 0 and 8 pixels at step 12 to 4 pixels at step 0 and 8 pixels at step 15",
        ),
        (
            ['data.train_sizes=[["25 percent", 8]]', "schedule.warmup=10%"],
            ["train.length=48 steps"],
            "schedule.warmup from 2 steps to 5 steps and data.train_sizes from 8 pixels at step 6 to 8 pixels at step 12",
        ),
    ],
)
def test_what_moves_is_refused_by_name(
    digits_recipe: Recipe, tmp_path: Path, begun: list[str], now: list[str], moved: str
) -> None:
    with pytest.raises(UserError, match=f"run x would not continue what it began: .* moves {moved}; give"):
        continued(digits_recipe, begun, now, tmp_path)


def test_another_warmup_of_the_same_length_is_another_recipe(digits_recipe: Recipe, tmp_path: Path) -> None:
    begun, now = ["schedule.warmup=4 steps"], ["schedule.warmup=5 steps"]
    with pytest.raises(
        UserError, match="started with another recipe .schedule.warmup from 4 steps to 5 steps"
    ):
        continued(digits_recipe, begun, now, tmp_path)


def test_a_decay_of_the_average_that_rises_over_the_run_keeps_its_length(
    digits_recipe: Recipe, tmp_path: Path
) -> None:
    longer = ["train.length=48 steps"]
    with pytest.raises(UserError, match=r"another recipe .train.length was 24 steps, is 48 steps"):
        continued(digits_recipe, [*AVERAGED, "train.ema_rise=3"], longer, tmp_path)
    continued(digits_recipe, AVERAGED, longer, tmp_path / "constant")


@pytest.mark.parametrize(
    ("begun", "now"),
    [
        ([], ["train.length=90 steps"]),
        (["schedule.warmup=4 steps"], ["train.length=9 epochs"]),
        (["schedule.warmup=2 percent"], ["train.length=30 steps"]),  # one step before and after
        (["schedule.warmup=10 percent"], ["train.length=90 steps", "schedule.warmup=2 steps"]),
        (
            [*AVERAGED, "train.ema_every=25 percent"],
            ["train.length=48 steps", "train.ema_every=6 steps"],
        ),
        (
            ['data.train_sizes=[["0 steps", 4], ["50 percent", 8]]'],
            ["train.length=48 steps", 'data.train_sizes=[["0 steps", 4], ["12 steps", 8]]'],
        ),
        (
            ["model.name=resnet9_fast", "data.image_size=12", "schedule.whitening_bias=25 percent"],
            ["train.length=48 steps", "schedule.whitening_bias=6 steps"],
        ),
        (
            ["train.log_every=10 percent", "train.eval_every=50%", "train.checkpoint_every=50%"],
            ["train.length=90 steps"],
        ),
    ],
)
def test_what_does_not_move_is_continued(
    digits_recipe: Recipe, tmp_path: Path, begun: list[str], now: list[str]
) -> None:
    continued(digits_recipe, begun, now, tmp_path)


def test_other_sizes_in_the_same_steps_are_refused(digits_recipe: Recipe, tmp_path: Path) -> None:
    begun, now = (f'data.train_sizes=[["0 steps", {size}], ["12 steps", 8]]' for size in (4, 6))
    with pytest.raises(UserError, match="from 4 pixels at step 0 and 8 pixels at step 12 to 6 pixels"):
        continued(digits_recipe, [begun], [now], tmp_path)


def test_a_new_run_has_nothing_to_continue(digits_recipe: Recipe, tmp_path: Path) -> None:
    run = choose_run(tmp_path, digits_recipe, "x", resume=False)
    check_continued(run, digits_recipe, read_index(digits_recipe.data.train))
