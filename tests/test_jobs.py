"""Every job: its recipe is valid, its docstring names source and result, and the loop trains with all its options."""

from __future__ import annotations

import ast
import io
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_dist.config import Data, Model, Optim, Recipe, Schedule, Train, WorkerRange, load_recipe
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare
from resnet_dist.driver.preflight import check_recipe
from resnet_dist.order.sizes import Sizes
from resnet_dist.runs.choose import MAY_CHANGE
from resnet_dist.train import loop
from resnet_dist.train.tracker import NullTracker
from resnet_dist.world import World
from tests import paths

JOBS = sorted(paths.JOBS.glob("*.py"))
SOURCES = tomllib.loads((paths.ROOT / "docs/recipe_sources.toml").read_text())
CLASSES = 10


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write shards of 320 pictures of 80 x 64 pixels, whose color depends on their class."""
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
def test_a_job_names_its_source_and_expected_result(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text is not None
    for heading in ("Source ", "Command ", "Expected ", "Measured ", "Differs "):
        assert f"\n{heading}" in text, heading
    assert f"resnet-dist train jobs/{path.name}" in text


@pytest.mark.parametrize("name", SOURCES["jobs"])
def test_each_field_of_a_job_stands_beside_its_source(name: str) -> None:
    """The table has every field that the job sets and that its curve depends on, and a file for each row."""
    recipe = load_recipe(paths.JOBS / f"{name}.py")
    plain = recipe.model_copy(
        update={
            "data": Data(train="", eval="", image_size=1, global_batch_size=8),
            "model": Model(),
            "optim": Optim(),
            "schedule": Schedule(),
            "train": Train(length="1 steps"),
        }
    ).flat()
    rows = SOURCES["jobs"][name]
    listed = [row["field"] for row in rows if "field" in row]
    assert len(set(listed)) == len(listed)
    differing = {key for key, value in recipe.flat().items() if value != plain[key]}
    assert differing - MAY_CHANGE - {"data.lanes"} <= set(listed)
    assert set(listed) <= recipe.flat().keys()
    assert {row["file"] for row in rows} <= SOURCES["files"].keys()
    assert all(("topic" in row) == ("here" in row) == ("field" not in row) for row in rows)


@pytest.mark.parametrize(
    ("epochs", "large_from"), [(16, 12), (24, 19), (32, 25), (40, 32), (56, 45), (88, 71)]
)
def test_the_fast_recipe_grows_its_images_at_the_epochs_of_its_source(
    epochs: int, large_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source interpolates at the start of each epoch, and rounds to the nearest multiple of 32, halves to even."""
    monkeypatch.setenv("EPOCHS", str(epochs))
    ramps = {16: (11, 13), 24: (17, 20), 32: (23, 27), 40: (29, 34), 56: (41, 48), 88: (65, 76)}
    theirs = [int(np.round(np.interp(epoch, ramps[epochs], (160, 192)) / 32)) * 32 for epoch in range(epochs)]
    assert theirs == [160] * large_from + [192] * (epochs - large_from)
    recipe = load_recipe(paths.JOBS / "imagenet_rn50_fast.py")
    steps_per_epoch = 312
    sizes = Sizes.of(recipe.data, lambda length: int(float(length.split()[0]) * steps_per_epoch))
    assert [sizes.at(epoch * steps_per_epoch) for epoch in range(epochs)] == theirs
    assert [sizes.at((epoch + 1) * steps_per_epoch - 1) for epoch in range(epochs)] == theirs


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_is_accepted_for_eight_ranks_or_two(path: Path) -> None:
    recipe = load_recipe(path)
    check_recipe(recipe, WorkerRange.exactly(8 if "imagenet" in path.stem else 2))
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_trains(path: Path, shards: Path, tmp_path: Path) -> None:
    """Train two steps of sixteen small pictures, with every other field from the job."""
    recipe = load_recipe(path, [*small(load_recipe(path)), f"data.train={shards / 'train'}"])
    recipe = recipe.with_overrides([f"data.eval={shards / 'eval'}"])
    outcome = loop.train(recipe, tmp_path / "run", World.single(), NullTracker())
    assert outcome.finished
    assert outcome.metrics["eval/samples"] == 60  # a fifth of the 32 of each class, in whole pictures
    assert np.isfinite(outcome.metrics["train/loss"])


def small(recipe: Recipe) -> list[str]:
    """Return the overrides that make a job small enough for a test."""
    data = recipe.data
    lanes = 2 if data.repeats == 1 else data.repeats if data.spread_repeats else 1
    overrides = [
        "data.source=none",
        "data.channels=3",
        "data.mean=[0.5, 0.5, 0.5]",
        "data.std=[0.25, 0.25, 0.25]",
        "data.global_batch_size=16",
        f"data.micro_batch_size={16 // lanes}",
        f"data.lanes={lanes}",
        "data.image_size=32",
        "model.init_from=none",
        "train.precision=fp32",  # Most CPUs emulate bf16.
        "optim.lr=0.01",  # The rates of the jobs suit larger batches.
        "train.length=2 steps",
        "train.log_every=1 steps",
        "train.eval_every=0 steps",
        "train.checkpoint_every=0 steps",
        "schedule.warmup=1 steps",
    ]
    if data.train_sizes:
        overrides.append('data.train_sizes=[["0 steps", 24], ["1 steps", 32]]')
    if data.eval_size:
        overrides.append("data.eval_size=40")
    if recipe.train.ema_decay is not None:
        overrides.append("train.ema_every=1 steps")
    if recipe.schedule.milestones:
        overrides.append('schedule.milestones=["1 steps"]')
    return overrides
