"""The texts after `--search`: what they mean, and the sentence about each mistake."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.config import Recipe
from resnet_dist.errors import UserError
from resnet_dist.sweep.search import Search, check_scheduler, num_combinations, read_searches


def read(recipe: Recipe, *texts: str, overrides: tuple[str, ...] = ()) -> tuple[Search, ...]:
    return read_searches(texts, recipe, overrides)


def test_ranges_and_lists_are_read(digits_recipe: Recipe) -> None:
    found = read(
        digits_recipe,
        "optim.lr=log:0.01..1",
        "optim.momentum = 0.8 .. 0.95",
        "seed=int:1..4",
        "model.name=resnet8, resnet20",
        "data.mean=[0.3],(0.31,)",
        "data.source=../a,../b",
    )
    assert [search.form for search in found] == ["log", "uniform", "int", "list", "list", "list"]
    assert (found[0].low, found[0].high) == (0.01, 1.0)
    assert found[2].ends == ("1", "4")
    assert found[3].choices == ("resnet8", "resnet20")
    assert found[4].choices == ("[0.3]", "(0.31,)")
    assert found[5].choices == ("../a", "../b")
    assert num_combinations(found[2:4]) == 8
    assert num_combinations(found[:1]) == float("inf")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim.lr", "must be FIELD=log:A..B, A..B, int:A..B or a,b,c"),
        ("optim.lr=", "must be FIELD="),
        ("optim.lrr=1..2", "--search optim.lrr: not a field of the recipe; did you mean optim.lr?"),
        ("optim.lr=0.1", "has one value; give two or more"),
        ("optim.lr=0.1,0.1", "or use --set optim.lr=0.1"),
        ("optim.lr=log:0..1", "a logarithm needs ends above 0"),
        ("optim.lr=log:0.1", "not a range; write it as log:0.01..1"),
        ("optim.lr=1..x", "not a range"),
        ("optim.lr=0.1..inf", "not a range"),
        ("optim.lr=2..1", "the first end must be below the second; write 1..2"),
        ("optim.lr=log:1..0.1", "write log:0.1..1"),
        ("optim.lr=-1..1", "optim.lr=-1: input should be greater than 0"),
        ("seed=1..4", "the field takes whole numbers; write int:1..4"),
        ("seed=log:1..4", "the field takes whole numbers; write int:1..4"),
        ("seed=int:1.5..4", "the ends of int: must be whole numbers"),
        ("model.name=log:1..4", "the field takes no numbers; give a list of values, a,b,c"),
        ("name=a,b", "no result depends on it"),
    ],
)
def test_a_mistake_gets_one_sentence(digits_recipe: Recipe, text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        read(digits_recipe, text)
    assert str(caught.value).startswith("--search")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_has_one_source(digits_recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"optim\.lr: is searched twice"):
        read(digits_recipe, "optim.lr=1,2", "optim.lr=3,4")
    with pytest.raises(UserError, match=r"--set optim\.lr: --search draws this field"):
        read(digits_recipe, "optim.lr=1,2", overrides=("optim.lr=3",))
    with pytest.raises(UserError, match="--search is missing"):
        read(digits_recipe)


def test_asha_needs_evaluations(digits_recipe: Recipe) -> None:
    silent = digits_recipe.with_overrides(["train.eval_every=0 steps"])
    check_scheduler("none", silent)
    check_scheduler("asha", digits_recipe)
    with pytest.raises(UserError, match=r"train\.eval_every='0 steps' evaluates at the end alone"):
        check_scheduler("asha", silent)


@given(st.floats(1e-6, 1e6), st.floats(1.001, 1e4), st.floats(0, 1), st.sampled_from(["log", "uniform"]))
def test_a_number_is_short_and_inside_its_range(low: float, ratio: float, share: float, form: str) -> None:
    search = Search("optim.lr", form, low, low * ratio)  # type: ignore[arg-type]
    value = search.low + share * (search.high - search.low)
    text = search.text_of(value)
    assert search.low <= float(text) <= search.high
    assert float(text) == pytest.approx(value, rel=1e-3)
