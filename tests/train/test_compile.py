"""Compiled code gives the same numbers and names, with DDP and micro-batches too. Needs a C++ compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from resnet_dist.config import Recipe
from resnet_dist.train.checkpoint.load import load_model
from resnet_dist.train.device import has_compiler
from tests.train.runs import final_tensors, run
from tests.train.test_elastic import curve

pytestmark = [
    pytest.mark.skipif(not has_compiler("cpu"), reason="no C++ compiler on this machine"),
    pytest.mark.timeout(900),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def recipe(digits_recipe: Recipe) -> Recipe:
    """A recipe with mixing, two micro-batches and an average: what could make compiled code compile again."""
    return digits_recipe.with_overrides(
        [
            "train.length=6 steps",
            "train.log_every=1 steps",
            "train.eval_every=3 steps",
            "data.mixup=0.4",
            "train.ema_decay=0.9",
        ]
    )


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_equals_eager(recipe: Recipe, tmp_path: Path, mode: str) -> None:
    eager = run(recipe, tmp_path / "eager")
    compiled = run(recipe.with_overrides([f"train.compile={mode}"]), tmp_path / "compiled")
    assert compiled.keys() == eager.keys()
    for key, value in eager.items():
        # An accuracy may differ by two of its samples, whose scores are as good as equal.
        samples = 128 if key[0].startswith("train/") else 360
        assert compiled[key] == pytest.approx(value, rel=1e-3, abs=2 / samples), key
    ours, theirs = final_tensors(tmp_path / "compiled"), final_tensors(tmp_path / "eager")
    assert ours.keys() == theirs.keys()  # names have no prefix of a wrapper
    for name in ("model/bn1.running_var", "raw/bn1.running_mean", "raw/fc.weight"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    # One graph for training, for all shares and micro-batches, and one for evaluation.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    load_model(tmp_path / "compiled", torch.device("cpu"))


def test_compiled_continues_where_eager_stopped(recipe: Recipe, tmp_path: Path) -> None:
    eager = run(recipe, tmp_path / "eager")
    compiled = recipe.with_overrides(["train.compile=default"])
    run(recipe, tmp_path / "moved", stop_after=3)
    rest = run(compiled, tmp_path / "moved")
    assert rest["train/loss", 6] == pytest.approx(eager["train/loss", 6], rel=1e-3)


@pytest.mark.long
def test_compiled_code_and_ranks_compose(digits_recipe: Recipe, tmp_path: Path) -> None:
    lengths = ["train.length=14 steps", "train.log_every=1 steps", "train.eval_every=7 steps"]
    recipe = digits_recipe.with_overrides([*lengths, "data.micro_batch_size=32"])
    one = curve(1, recipe, tmp_path / "one")
    two = curve(2, recipe.with_overrides(["train.compile=default"]), tmp_path / "two")
    assert two[:8] == pytest.approx(one[:8], rel=1e-3)
