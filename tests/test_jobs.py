"""Every job: a recipe that can be run, that says where it comes from, and whose loop goes round with all its options."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_dist.config import Recipe, load_recipe
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare
from resnet_dist.driver.preflight import check_recipe
from resnet_dist.train import loop
from resnet_dist.train.tracker import NullTracker
from resnet_dist.world import World

JOBS = sorted((Path(__file__).parent.parent / "jobs").glob("*.py"))
CLASSES = 10


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 pictures of 80 x 64 pixels, whose class shows in their color."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(320):
        pixels = rng.integers(0, 60, (64, 80, 3), np.uint8)
        pixels[..., number % 3] += np.uint8(number % CLASSES * 19)
        path = folder / "images" / f"class-{number % CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg")
        path.write_bytes(buffer.getvalue())
    prepare(open_source(str(folder / "images")), folder / "shards")
    return folder / "shards"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_says_where_it_comes_from_and_what_to_expect(path: Path) -> None:
    words = ast.get_docstring(ast.parse(path.read_text()))
    assert words is not None
    for heading in ("Source ", "Command ", "Expected ", "Measured "):
        assert f"\n{heading}" in words, heading
    assert f"resnet-dist train jobs/{path.name}" in words


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_is_accepted_for_eight_ranks_or_two(path: Path) -> None:
    recipe = load_recipe(path)
    check_recipe(recipe, 8 if "imagenet" in path.stem else 2)
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_trains(path: Path, shards: Path, tmp_path: Path) -> None:
    """Two steps of sixteen small pictures, with every other field as the job has it."""
    recipe = load_recipe(path, [*small(load_recipe(path)), f"data.train={shards / 'train'}"])
    recipe = recipe.with_overrides([f"data.eval={shards / 'eval'}"])
    outcome = loop.train(recipe, tmp_path / "run", World.single(), NullTracker())
    assert outcome.finished
    assert outcome.metrics["eval/samples"] == 64
    assert np.isfinite(outcome.metrics["train/loss"])


def small(recipe: Recipe) -> list[str]:
    data = recipe.data
    lanes = 2 if data.repeats == 1 else 1
    overrides = [
        "data.source=none",
        "data.channels=3",
        "data.mean=[0.5, 0.5, 0.5]",
        "data.std=[0.25, 0.25, 0.25]",
        "data.global_batch_size=16",
        f"data.micro_batch_size={16 // lanes}",
        f"data.lanes={lanes}",
        "data.image_size=64",
        "model.init_from=none",
        "train.precision=fp32",  # bf16 is emulated on most CPUs
        "optim.lr=0.01",  # the rates suit larger batches
        "train.length=2 steps",
        "train.log_every=1 steps",
        "train.eval_every=0 steps",
        "train.checkpoint_every=0 steps",
        "schedule.warmup=1 steps",
    ]
    if data.train_sizes:
        overrides.append('data.train_sizes=[["0 steps", 32], ["1 steps", 64]]')
    if data.eval_size:
        overrides.append("data.eval_size=64")
    if recipe.train.ema_decay is not None:
        overrides.append("train.ema_every=1 steps")
    if recipe.schedule.milestones:
        overrides.append('schedule.milestones=["1 steps"]')
    return overrides
