"""The numbers of ranks: parsed from what a person types, and limited to what the recipe allows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.config import Recipe, UserError, WorkerRange, check_world_size, load_recipe
from tests.paths import ROOT

RECIPE = load_recipe(
    ROOT / "jobs/digits.py",
    ["data.global_batch_size=240", "data.micro_batch_size=10", "data.lanes=24"],
)


def test_one_number_may_become_smaller_but_begins_whole(digits_recipe: Recipe) -> None:
    workers = WorkerRange.parse("2")
    assert (workers.preferred, workers.max, workers.is_range, str(workers)) == (2, 2, False, "2")
    assert workers.sizes(digits_recipe) == [2, 1]
    assert WorkerRange.parse("1") == WorkerRange.exactly(1)


@pytest.mark.parametrize(
    ("overrides", "workers"),
    [
        ([], "2"),
        (["data.lanes=1", "data.micro_batch_size=null"], "1"),
        (["data.micro_batch_size=128"], "1"),
        (["data.global_batch_size=129", "data.lanes=3", "data.micro_batch_size=43"], "1"),
    ],
)
def test_without_a_number_the_recipe_decides(
    digits_recipe: Recipe, overrides: list[str], workers: str
) -> None:
    recipe = digits_recipe.with_overrides(overrides)
    assert str(WorkerRange.default(recipe)) == workers
    check_world_size(recipe.data, int(workers))
    assert str(WorkerRange.default(recipe, limit=1)) == "1"  # a machine with one GPU


def test_a_range_uses_what_the_recipe_allows(digits_recipe: Recipe) -> None:
    recipe = digits_recipe.with_overrides(["data.global_batch_size=128", "data.micro_batch_size=16"])
    assert WorkerRange.parse("2:7").sizes(recipe) == [4, 2]
    assert str(WorkerRange.parse(" 2:7 ")) == "2:7"
    with pytest.raises(UserError, match=r"--workers 3: .*8 micro-batches.*\[1, 2, 4, 8\]"):
        WorkerRange.exactly(3).sizes(recipe)


def test_batch_norm_must_see_the_same_images_on_every_number_of_ranks(digits_recipe: Recipe) -> None:
    recipe = digits_recipe.with_overrides(["data.micro_batch_size=null"])
    assert WorkerRange.parse("2").sizes(recipe) == [2]  # It never resumes with one.
    with pytest.raises(UserError, match="--workers 1:2: without data.micro_batch_size"):
        WorkerRange.parse("1:2").sizes(recipe)
    synced = recipe.with_overrides(["train.sync_batch_norm=true"])
    assert WorkerRange.parse("1:2").sizes(synced) == [2, 1]


@pytest.mark.parametrize("text", ["", "0", "-1", "4:2", "0:2", "2:", ":2", "1:2:3", "two", "1.5", "²"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--workers"):
        WorkerRange.parse(text)


@given(st.integers(1, 40), st.integers(0, 40))
def test_every_size_is_legal(low: int, more: int) -> None:
    workers = WorkerRange.parse(f"{low}:{low + more}")
    try:
        sizes = workers.sizes(RECIPE)
    except UserError:
        sizes = []
    legal = []
    for size in range(low, low + more + 1):
        try:
            check_world_size(RECIPE.data, size)
        except UserError:
            continue
        legal.append(size)
    assert sizes == legal[::-1]
