"""The loop on real digits: restarts change nothing, and what must stop a run stops it."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resnet_dist.config import Recipe
from resnet_dist.data.batches.loader import Batch, Loader
from resnet_dist.data.images.decode import open_image
from resnet_dist.data.images.opened import Image
from resnet_dist.data.shards.index import read_index
from resnet_dist.errors import TrainingError
from resnet_dist.train import loop
from resnet_dist.train.plan import Plan, order_of
from resnet_dist.train.start.initial import initial_state
from resnet_dist.train.step.train_step import TrainStep
from resnet_dist.world import World
from tests.digits import small_recipe
from tests.paths import list_checkpoints
from tests.train.runs import Recorder, assert_same, final_tensors

WORLD = World.single()


@pytest.fixture(scope="module")
def uninterrupted(
    digits_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Recorder]]:
    """Yield the folder of a finished run, which no test changes, and all that it logged."""
    folder, recorder = tmp_path_factory.mktemp("whole"), Recorder()
    outcome = loop.train(small_recipe(digits_data), folder, WORLD, recorder)
    assert outcome.finished
    assert outcome.metrics["eval/samples"] == 360
    before = contents(folder)
    yield folder, recorder
    assert contents(folder) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_stopped_and_resumed_equals_uninterrupted_bitwise(
    digits_recipe: Recipe, tmp_path: Path, uninterrupted: tuple[Path, Recorder]
) -> None:
    folder, recorder = tmp_path / "stopped", Recorder()
    for stop_after in (3, 4, 6):  # between log lines, across an epoch's end, and in the evaluation of step 12
        calls = iter(range(100))
        outcome = loop.train(
            digits_recipe, folder, WORLD, recorder, lambda n=stop_after, c=calls: next(c) == n - 1
        )
        assert not outcome.finished
    assert loop.train(digits_recipe, folder, WORLD, recorder).step == 24
    assert "resumed at step 12 of 24" in recorder.notes
    assert_same(folder, uninterrupted[0])
    assert recorder.metrics == uninterrupted[1].metrics


def test_killed_and_resumed_equals_uninterrupted_bitwise(
    digits_recipe: Recipe, tmp_path: Path, uninterrupted: tuple[Path, Recorder]
) -> None:
    folder, recorder = tmp_path / "killed", Recorder(dies_at=20)
    with pytest.raises(KeyboardInterrupt):
        loop.train(digits_recipe, folder, WORLD, recorder)
    recorder.dies_at = None
    loop.train(digits_recipe, folder, WORLD, recorder)
    assert recorder.notes == ["resumed at step 16 of 24"]
    assert_same(folder, uninterrupted[0])
    assert recorder.metrics == uninterrupted[1].metrics


def test_a_damaged_checkpoint_is_skipped(
    digits_recipe: Recipe, tmp_path: Path, uninterrupted: tuple[Path, Recorder]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(uninterrupted[0], folder)
    before = final_tensors(folder)
    older, newest = list_checkpoints(folder / "checkpoints")  # keep_checkpoints=2
    path = newest / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    (folder / "checkpoints/.step-00000099.partial").mkdir()  # left by a killed writer
    recorder = Recorder()
    loop.train(digits_recipe, folder, WORLD, recorder)
    assert "does not match its checksum" in recorder.notes[0]
    assert recorder.notes[1] == f"resumed at step {int(older.name[5:])} of 24"
    after = final_tensors(folder)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_finished_run_ends_at_once(digits_recipe: Recipe, uninterrupted: tuple[Path, Recorder]) -> None:
    outcome = loop.train(digits_recipe, uninterrupted[0], WORLD, recorder := Recorder())
    assert outcome.finished
    assert outcome.metrics["eval/samples"] == 360
    assert recorder.metrics == {}


def test_64_images_are_overfitted(digits_recipe: Recipe, tmp_path: Path) -> None:
    index = read_index(digits_recipe.data.train)
    recipe = digits_recipe.with_overrides(
        ["train.length=40 steps", "optim.lr=0.05", "data.micro_batch_size=none"]
    )
    order = order_of(recipe, index)
    plan = Plan.of(recipe, order)
    state = initial_state(recipe, 10, WORLD)
    step = TrainStep(state, recipe, plan, WORLD)
    with Loader(index, order, recipe.data, WORLD, seed=0) as loader:
        batch = loader.batch_at(0)
    batch = type(batch)(
        batch.images_BSSC[:64], batch.labels_B[:64], batch.weights_B[:64], batch.ids_B[:64], (), 0.0
    )
    for _ in range(40):
        step(batch)
        state.step += 1
        metrics = state.meter.flush(WORLD)
    assert metrics["train/top1"] == 1.0
    assert metrics["train/loss"] < 0.05


def test_no_decay_on_norms_and_biases(digits_recipe: Recipe) -> None:
    state = initial_state(digits_recipe, 10, WORLD)
    decay = {id(p): group["weight_decay"] for group in state.optimizer.param_groups for p in group["params"]}
    for module in state.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decayed = isinstance(module, nn.Conv2d | nn.Linear) and name == "weight"
            assert decay[id(parameter)] == (1e-4 if decayed else 0.0)


def test_a_loss_that_is_not_finite_stops_the_run(digits_recipe: Recipe, tmp_path: Path) -> None:
    recipe = digits_recipe.with_overrides(["optim.lr=1e30", "schedule.warmup=0 steps"])
    with pytest.raises(TrainingError, match=r"not finite at step [1-5], first on rank 0 in .*optim\.lr"):
        loop.train(recipe, tmp_path, WORLD, Recorder())


def test_too_many_bad_samples_stop_the_run(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(data: bytes, channels: int, max_pixels: int) -> None:
        raise ValueError("not a readable image")

    monkeypatch.setattr("resnet_dist.data.batches.fill.open_image", refuse)
    with pytest.raises(TrainingError, match=r"640 samples \(100\.00%\).*max_bad_fraction=0\.001"):
        loop.train(digits_recipe.with_overrides(["optim.lr=1e-3"]), tmp_path, WORLD, Recorder())


@pytest.mark.parametrize(
    ("every", "text"),
    [
        (
            2,
            r"180 samples \(50\.00%\) could not be decoded in the evaluation of step 1, more than data\.max_bad",
        ),
        (
            1,
            "none of the 360 samples of .* can be evaluated; the first that could not be decoded is digits-eval-0",
        ),
    ],
)
def test_too_many_bad_evaluation_samples_stop_the_run(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, text: str
) -> None:
    number = itertools.count()

    def refuse_some(data: bytes, channels: int, max_pixels: int) -> Image:
        if evaluating and next(number) % every == 0:
            raise ValueError("not a readable image")
        return open_image(data, channels, max_pixels)

    evaluating: list[bool] = []
    evaluate = loop.evaluate

    def begin_evaluation(*arguments: Any) -> dict[str, float]:
        evaluating.append(True)
        return evaluate(*arguments)

    monkeypatch.setattr("resnet_dist.data.batches.fill.open_image", refuse_some)
    monkeypatch.setattr(loop, "evaluate", begin_evaluation)
    recorder = Recorder()
    overrides = ["train.length=1 steps", "schedule.warmup=0 steps", "data.loader_workers=1"]
    with pytest.raises(TrainingError, match=text):
        loop.train(digits_recipe.with_overrides(overrides), tmp_path, WORLD, recorder)
    assert recorder.notes[0].startswith("bad evaluation sample digits-eval-0")
    assert recorder.notes[20] == f"and {360 // every - 20} more bad evaluation samples"


def test_bad_samples_are_named_and_counted(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = itertools.count()

    def refuse_some(data: bytes, channels: int, max_pixels: int) -> Image:
        if next(number) % 40 == 0:
            raise ValueError("not a readable image")
        return open_image(data, channels, max_pixels)

    monkeypatch.setattr("resnet_dist.data.batches.fill.open_image", refuse_some)
    recorder = Recorder()
    overrides = ["data.max_bad_fraction=0.1", "train.length=10 steps", "data.loader_workers=1"]
    loop.train(digits_recipe.with_overrides(overrides), tmp_path, WORLD, recorder)
    named = [text for text in recorder.notes if text.startswith("bad sample digits-train-0")]
    assert all(text.endswith(": not a readable image") for text in named)
    assert recorder.metrics["data/bad_samples", 10] == len(named) == 10 * 128 // 40


@pytest.mark.parametrize(
    "override",
    ["data.mixup=0.3", "data.cutmix=1", "train.label_smoothing=0.2", "train.precision=bf16", "seed=1"],
)
def test_one_field_changes_the_curve(
    digits_recipe: Recipe, tmp_path: Path, uninterrupted: tuple[Path, Recorder], override: str
) -> None:
    recorder = Recorder()
    recipe = digits_recipe.with_overrides([override, "train.length=5 steps"])
    loop.train(recipe, tmp_path / "changed", WORLD, recorder)
    loss = recorder.metrics["train/loss", 5]
    assert math.isfinite(loss)
    assert loss != uninterrupted[1].metrics["train/loss", 5]


def test_a_run_trains_on_the_order_of_its_version(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = digits_recipe.with_overrides(["train.length=2 steps"])
    index, batch_at, seen = read_index(recipe.data.train), Loader.batch_at, list[np.ndarray]()

    def spy(self: Loader, step: int) -> Batch:
        batch = batch_at(self, step)
        if self.order.training:
            seen.append(batch.ids_B)
        return batch

    monkeypatch.setattr(Loader, "batch_at", spy)
    for version in (1, 2):
        seen.clear()
        loop.train(recipe, tmp_path / str(version), WORLD, Recorder(), order_version=version)
        order = order_of(recipe, index, version)
        assert order.version == version
        expected = [order.ids_at(step, range(order.lanes)) for step in range(2)]
        np.testing.assert_array_equal(seen, expected)
    default = tmp_path / "default"
    loop.train(recipe, default, WORLD, Recorder())
    assert_same(default, tmp_path / "2")
    np.testing.assert_array_equal(seen[2:], seen[:2])
