"""Checkpoints: write aside, flush, rename; verify on read; the newest good one wins.

A checkpoint is a folder `step-00000120/` of safetensors files and a `checkpoint.json` that holds their
SHA-256, the scalars and the recipe. It holds no pickles, and its model.safetensors is the model's state dict.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from resnet_dist.config import Recipe
from resnet_dist.train.state import TrainState
from resnet_dist.world import World

MANIFEST = "checkpoint.json"


class DamagedCheckpoint(ValueError):
    """A checkpoint folder whose files are not what its manifest says."""


class Checkpoints:
    """The checkpoints of one run. Rank 0 writes, from a thread; the loop does not wait for the disk."""

    def __init__(self, folder: Path, recipe: Recipe, classes: tuple[str, ...], world: World) -> None:
        self._folder, self._recipe, self._classes, self._world = folder, recipe, classes, world
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: TrainState) -> None:
        """Begin to write `state`; all ranks call it. Raises what the write before it raised."""
        state.meter.gather(self._world)
        self.wait()
        if not self._world.is_main:
            return
        tensors = {
            file: {name: t.detach().to("cpu", copy=True).contiguous() for name, t in group.items()}
            for file, group in state.tensors().items()
        }
        scalars = dict(state.scalars())
        self._writer = threading.Thread(target=self._write, args=(tensors, scalars), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Until what was saved is on disk. Raises OSError where it could not be written."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def restore_newest(self, state: TrainState, report: Callable[[str], None]) -> bool:
        """Load the newest good checkpoint on every rank; False where there is none.

        Damaged ones are passed over and reported. Rank 0 chooses, so that all ranks load the same.
        """
        chosen = self._newest_good(report) if self._world.is_main else None
        chosen = self._world.broadcast(chosen)
        if chosen is None:
            return False
        tensors, manifest = read_checkpoint(self._folder / chosen)
        state.load(tensors, manifest["scalars"], is_main=self._world.is_main)
        return True

    def _newest_good(self, report: Callable[[str], None]) -> str | None:
        for folder in reversed(list_checkpoints(self._folder)):
            try:
                read_checkpoint(folder)
                return folder.name
            except DamagedCheckpoint as problem:
                report(f"passed over a damaged checkpoint: {problem}")
        return None

    def _write(self, tensors: dict[str, dict[str, Tensor]], scalars: dict[str, Any]) -> None:
        try:
            manifest = {
                "scalars": scalars,
                "recipe": self._recipe.model_dump(mode="json"),
                "classes": list(self._classes),
            }
            write_checkpoint(self._folder / f"step-{scalars['step']:08d}", tensors, manifest)
            for old in list_checkpoints(self._folder)[: -self._recipe.train.keep_checkpoints]:
                shutil.rmtree(old, ignore_errors=True)
        except BaseException as error:  # raised in the loop's thread, by wait()
            self._error = error


def write_checkpoint(folder: Path, tensors: dict[str, dict[str, Tensor]], manifest: dict[str, Any]) -> None:
    """Write all files aside, flush them, and rename: `folder` is whole or not there."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an attempt that died while writing
    partial.mkdir(parents=True)
    checksums = {}
    for name, group in tensors.items():
        path = partial / f"{name}.safetensors"
        save_file(group, path)
        checksums[path.name] = _sha256(path)
    (partial / MANIFEST).write_text(json.dumps({"sha256": checksums, **manifest}, indent=1) + "\n")
    for path in [*partial.iterdir(), partial]:
        _flush(path)
    if folder.exists():  # a damaged one of the same step, or the same bytes from before a restart
        shutil.rmtree(folder)
    partial.rename(folder)
    _flush(folder.parent)


def read_checkpoint(
    folder: Path, only: tuple[str, ...] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by file and name, manifest), verified. Raises DamagedCheckpoint.

    `only` reads some of the files: a model is packaged without the optimizer.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        tensors = {}
        for name, checksum in manifest["sha256"].items():
            path = folder / name
            if only is not None and path.stem not in only:
                continue
            if _sha256(path) != checksum:
                raise DamagedCheckpoint(f"{path} does not match its checksum")
            tensors[path.stem] = load_file(path)
        return tensors, manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, DamagedCheckpoint):
            raise
        raise DamagedCheckpoint(f"{folder}: {type(error).__name__}: {error}") from None


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    return sorted(folder.glob("step-*"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
