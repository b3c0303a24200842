"""Checkpoints: when they are saved, which are kept, and disks that are slow, full or damaged."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from resnet_dist.config import Recipe
from resnet_dist.errors import UserError
from resnet_dist.runs.storage import folder_bundles
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Unreachable
from resnet_dist.train import loop
from resnet_dist.train.checkpoint import store
from resnet_dist.train.checkpoint import writer as checkpointer
from resnet_dist.train.checkpoint.folder import (
    DamagedCheckpoint,
    best_checkpoint,
    read_checkpoint,
)
from resnet_dist.train.checkpoint.load import load_model
from resnet_dist.train.checkpoint.writer import Checkpointer, CheckpointFailed
from resnet_dist.train.start.initial import initial_state
from resnet_dist.train.state.train_state import Best, TrainState
from resnet_dist.world import World
from tests.paths import list_checkpoints
from tests.train.runs import Recorder

WORLD = World.single()


@pytest.fixture
def state(digits_recipe: Recipe) -> TrainState:
    return initial_state(digits_recipe, 10, WORLD)


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def saver(digits_recipe: Recipe, tmp_path: Path, notes: list[str]) -> Iterator[Checkpointer]:
    classes = tuple("0123456789")
    with Checkpointer(
        open_storage(tmp_path / "checkpoints"), digits_recipe, classes, WORLD, notes.append
    ) as made:
        yield made


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder / "checkpoints")]


class SlowDisk:
    """A disk on which every write waits for `proceed`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.proceed = threading.Semaphore(0), threading.Semaphore(0)
        write = store.write_checkpoint

        def wait_and_write(*arguments: object) -> object:
            self.begun.release()
            assert self.proceed.acquire(timeout=60)
            return write(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(store, "write_checkpoint", wait_and_write)


def save(saver: Checkpointer, state: TrainState, step: int) -> None:
    state.step = step
    with torch.no_grad():
        next(state.model.parameters()).fill_(step)
    saver.save(state)


def test_a_slow_disk_costs_intermediate_checkpoints_and_never_the_last(
    saver: Checkpointer, state: TrainState, tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    save(saver, state, 1)
    assert disk.begun.acquire(timeout=60)
    for step in (2, 3, 4):  # none of them waits
        save(saver, state, step)
    for _ in range(2):
        disk.proceed.release()
    saver.wait()
    assert steps(tmp_path) == [1, 4]
    assert [note.split(" was ")[0] for note in notes] == [
        "the checkpoint of step 2",
        "the checkpoint of step 3",
    ]
    for step in (1, 4):  # they are copies: later changes of the model are not in them
        tensors, manifest = read_checkpoint(tmp_path / f"checkpoints/step-0000000{step}")
        first = next(name for name, _ in state.model.named_parameters())
        assert (tensors["model"][first] == step).all()
        assert manifest["scalars"]["step"] == step


def test_the_best_one_is_written_though_the_disk_is_slow(
    saver: Checkpointer, state: TrainState, tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    save(saver, state, 1)
    assert disk.begun.acquire(timeout=60)
    state.best = Best("eval/top1", 0.9, step=2)
    save(saver, state, 2)
    third = threading.Thread(target=save, args=(saver, state, 3))  # it waits until the first is on disk
    third.start()
    for _ in range(3):
        disk.proceed.release()
    third.join(timeout=60)
    saver.wait()
    assert steps(tmp_path) == [2, 3]
    assert notes == []


def test_best_is_kept_beside_the_newest(saver: Checkpointer, state: TrainState, tmp_path: Path) -> None:
    for step, value in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.8), (5, 0.2)):
        state.step = step
        state.evaluated({"eval/top1": value, "eval/loss": 1 - value}, "eval/top1")
        saver.save(state)
        saver.wait()
    assert steps(tmp_path) == [2, 4, 5]  # keep_checkpoints=2
    best = best_checkpoint(open_storage(tmp_path / "checkpoints"))
    assert best is not None
    assert best == "step-00000002"


def test_a_restart_knows_the_best_value(digits_recipe: Recipe, tmp_path: Path) -> None:
    overrides = ["train.best_metric=eval/loss", "train.eval_every=2 steps", "train.checkpoint_every=0 steps"]
    recipe = digits_recipe.with_overrides([*overrides, "train.length=12 steps", "train.log_every=1 steps"])
    whole, parts = Recorder(), Recorder()
    loop.train(recipe, tmp_path / "whole", WORLD, whole)
    calls = iter(range(1000))
    loop.train(recipe, tmp_path / "parts", WORLD, parts, lambda: next(calls) == 20)
    loop.train(recipe, tmp_path / "parts", WORLD, parts)
    losses = {step: value for (name, step), value in whole.metrics.items() if name == "eval/loss"}
    for folder in ("whole", "parts"):
        checkpoints = tmp_path / folder / "checkpoints"
        best = best_checkpoint(open_storage(checkpoints))
        assert best is not None
        scalars = read_checkpoint(checkpoints / best)[1]["scalars"]
        assert scalars["best"] == {
            "metric": "eval/loss",
            "value": min(losses.values()),
            "step": scalars["step"],
        }
        assert losses[scalars["step"]] == min(losses.values())


def test_checkpoints_by_time(digits_recipe: Recipe, tmp_path: Path) -> None:
    overrides = ["train.checkpoint_every=0 steps", "train.keep_checkpoints=99", "train.length=6 steps"]
    recipe = digits_recipe.with_overrides(overrides)
    loop.train(recipe, tmp_path / "never", WORLD, Recorder())
    assert steps(tmp_path / "never") == [6]
    always = recipe.with_overrides(["train.checkpoint_minutes=1e-9"])
    loop.train(always, tmp_path / "always", WORLD, log := Recorder())
    skipped = sum("was skipped" in note for note in log.notes)
    assert len(steps(tmp_path / "always")) == 6 - skipped


def test_a_checkpoint_that_waits_for_a_storage_names_it(
    saver: Checkpointer, state: TrainState, tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A longer interval between checkpoints would be the wrong advice."""
    tries, has_room, write = threading.Semaphore(0), threading.Event(), store.write_checkpoint

    def refuse(*arguments: object) -> object:
        tries.release()
        if not has_room.is_set():
            raise Unreachable("s3://b: it has no room left")
        return write(*arguments)

    monkeypatch.setattr(store, "write_checkpoint", refuse)
    monkeypatch.setattr(checkpointer, "RETRY_SECONDS", 0.01)
    state.best = Best("eval/top1", 0.9, step=1)
    save(saver, state, 1)
    for _ in range(2):  # With the second try the first one has failed.
        assert tries.acquire(timeout=60)
    save(saver, state, 2)
    save(saver, state, 3)
    has_room.set()
    saver.wait()
    expected = "the storage has not taken the one before it yet (s3://b: it has no room left)"
    assert notes == [f"the checkpoint of step 2 was skipped: {expected}"]
    assert steps(tmp_path) == [1, 3]


def full_disk(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_reported_and_leaves_nothing_half_written(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, calls = Recorder(), iter(range(100))
    loop.train(digits_recipe, tmp_path, WORLD, log, lambda: next(calls) == 8)
    monkeypatch.setattr(folder_bundles, "flush_to_disk", full_disk)
    with pytest.raises(
        CheckpointFailed, match=r"step 24 could not be written to .*: No space left on device"
    ):
        loop.train(digits_recipe, tmp_path, WORLD, log)
    reports = [note for note in log.notes if "No space left" in note]
    assert [note.split(" could")[0] for note in reports] == [
        "the checkpoint of step 16",
        "the checkpoint of step 24",
    ]
    assert all("the last that is kept is step-00000009" in note for note in reports)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00000008",
        "step-00000009",
    ]


@pytest.mark.parametrize("file", ["model", "raw", "optimizer"])
def test_a_state_that_is_not_finite_is_not_saved(
    digits_recipe: Recipe, saver: Checkpointer, tmp_path: Path, file: str
) -> None:
    state = initial_state(digits_recipe.with_overrides(["train.ema_decay=0.9"]), 10, WORLD)
    save(saver, state, 1)
    saver.wait()
    name = "fc.bias/momentum_buffer" if file == "optimizer" else "fc.bias"
    state.tensors()[file][name].data[3] = float("nan")
    save(saver, state, 2)
    with pytest.raises(
        CheckpointFailed, match=rf"step 2 was not written: {name} of {file}\.safetensors holds values"
    ):
        saver.wait()
    assert steps(tmp_path) == [1]


def test_replacing_a_damaged_one_of_the_same_step(
    saver: Checkpointer, state: TrainState, tmp_path: Path
) -> None:
    save(saver, state, 1)
    saver.wait()
    (tmp_path / "checkpoints/step-00000001/model.safetensors").write_bytes(b"")
    save(saver, state, 1)
    saver.wait()
    read_checkpoint(tmp_path / "checkpoints/step-00000001")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def damage(folder: Path, step: int) -> None:
    path = folder / f"checkpoints/step-{step:08d}/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_damaged_newer_ones_do_not_take_the_place_of_good_ones(
    digits_recipe: Recipe, saver: Checkpointer, state: TrainState, tmp_path: Path, notes: list[str]
) -> None:
    recipe = digits_recipe.with_overrides(["train.keep_checkpoints=2"])
    for step in (4, 8, 9):
        save(saver, state, step)
        saver.wait()
        if step == 4:
            kept = tmp_path / "checkpoints/step-00000004"
            kept.rename(tmp_path / "kept")
    (tmp_path / "kept").rename(kept)
    damage(tmp_path, 8)
    damage(tmp_path, 9)
    with Checkpointer(open_storage(tmp_path / "checkpoints"), recipe, (), WORLD, notes.append) as again:
        assert again.restore(state)
        assert state.step == 4
        assert steps(tmp_path) == [4, 8, 9]  # kept until a newer one exists: they may become readable again
        save(again, state, 6)
        again.wait()
        assert steps(tmp_path) == [4, 6]
        save(again, state, 8)
        again.wait()
        assert steps(tmp_path) == [6, 8]


@pytest.mark.parametrize("old", ['"step": 1,', '"lr": 0.1,', '"bad_samples": 0,'])
def test_a_changed_manifest_is_damage(
    saver: Checkpointer, state: TrainState, tmp_path: Path, notes: list[str], old: str
) -> None:
    save(saver, state, 1)
    saver.wait()
    path = tmp_path / "checkpoints/step-00000001/checkpoint.json"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, old.replace("1,", "3,").replace("0,", "8,")))
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint\.json does not match its checksum"):
        read_checkpoint(path.parent)
    assert best_checkpoint(open_storage(path.parent.parent)) is None
    assert not saver.restore(state)
    assert "skipped a damaged checkpoint" in notes[0]


@pytest.mark.parametrize("field", ["scalars", "recipe", "classes", "sha256", "model.safetensors"])
def test_a_manifest_without_a_field_is_damage_and_one_without_checksum_is_older(
    saver: Checkpointer, state: TrainState, tmp_path: Path, field: str
) -> None:
    save(saver, state, 1)
    saver.wait()
    path = tmp_path / "checkpoints/step-00000001/checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["manifest_sha256"]
    path.write_text(json.dumps(manifest))
    assert saver.restore(state)
    del (manifest["sha256"] if field in manifest["sha256"] else manifest)[field]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match=field.removesuffix(".safetensors")):
        read_checkpoint(path.parent)
    with pytest.raises(UserError, match="no model to load"):
        load_model(path.parent, WORLD.device)


def test_a_recipe_that_this_version_refuses_is_reported_in_one_sentence(
    saver: Checkpointer, state: TrainState, tmp_path: Path
) -> None:
    save(saver, state, 1)
    saver.wait()
    path = tmp_path / "checkpoints/step-00000001/checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["manifest_sha256"]
    manifest["recipe"]["optim"]["rate"] = 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"recipe cannot be used: optim\.rate is not a field of the recipe"):
        load_model(path.parent, WORLD.device)
