"""The recipe on the digits that most tests train."""

from __future__ import annotations

from pathlib import Path

from resnet_dist.config import Recipe, load_recipe
from tests.paths import ROOT


def small_recipe(digits_data: Path) -> Recipe:
    """Return the recipe of jobs/digits.py, with a network and a length that suit a test."""
    overrides = [
        f"data.train={digits_data}/train",
        f"data.eval={digits_data}/eval",
        "model.name=resnet8",
        "train.length=24 steps",
        "train.log_every=5 steps",
        "train.eval_every=12 steps",
        "train.checkpoint_every=8 steps",
        # Drawing takes seconds; the tests of figures ask for them.
        "train.figures=none",
    ]
    return load_recipe(ROOT / "jobs/digits.py", overrides)
