"""When the state is saved, and how without the loop waiting: a copy in host memory, and a thread that writes it.

Two copies at most exist: one on its way to the disk, and one that waits. The newest takes the place of the one
that waits, so a disk that is slower than checkpoints fall due costs the intermediate ones, never the last.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from resnet_dist.config import Recipe
from resnet_dist.errors import TrainingError
from resnet_dist.train.checkpoint.folder import (
    DamagedCheckpoint,
    Tensors,
    folder_of,
    list_checkpoints,
    newest_good,
    prune,
    read_checkpoint,
    remove,
    remove_unfinished,
    write_checkpoint,
)
from resnet_dist.train.plan import Plan, due
from resnet_dist.train.state.train_state import TrainState
from resnet_dist.train.watch.control import Control
from resnet_dist.world import World


class CheckpointFailed(TrainingError):
    """A checkpoint that could not be written."""


@dataclass(frozen=True)
class Snapshot:
    """A state at one step, in host memory."""

    tensors: Tensors
    scalars: dict[str, Any]
    copied: torch.cuda.Event | None  # on a GPU: when the copies are there
    must_be_written: bool  # the best so far, which no later one replaces


class Checkpointer:
    """The checkpoints of one run. Rank 0 writes; all ranks call `restore` and `save`."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        classes: tuple[str, ...],
        world: World,
        report: Callable[[str], None],
    ) -> None:
        self._folder, self._recipe, self._classes, self._world = folder, recipe, classes, world
        self._report = report  # from the writer's thread too
        minutes = recipe.train.checkpoint_minutes
        self._interval_seconds = None if minutes is None else 60 * minutes
        self._saved_at = time.monotonic()
        self._free: list[Tensors] = [{}, {}]  # buffers of snapshots, made when first needed
        self._waiting: Snapshot | None = None
        self._writing: Snapshot | None = None
        self._failure: CheckpointFailed | None = None  # of the newest write
        self._passed_over: list[Path] = []  # damaged, and newer than what was restored
        self._closing = False
        self._changed = threading.Condition()
        # A daemon: a disk that hangs for ever shall not keep the process.
        self._writer = threading.Thread(target=self._write_all, name="checkpoint", daemon=True)

    def restore(self, state: TrainState) -> bool:
        """Load the newest good checkpoint on every rank; False where there is none.

        Damaged ones are passed over and reported. Rank 0 chooses, so that all ranks load the same.
        """
        found = None
        if self._world.is_main:
            remove_unfinished(self._folder)
            found = newest_good(self._folder, self._report)
            self._passed_over = [c for c in list_checkpoints(self._folder) if not found or c > found.folder]
        name = self._world.broadcast(found.folder.name if found else None)
        if name is None:
            return False
        if found is not None:
            tensors, manifest = found.tensors, found.manifest
        else:
            tensors, manifest = self._read(name)
        state.load(tensors, manifest["scalars"], self._world)
        return True

    def due_by_time(self) -> bool:
        """Whether `train.checkpoint_minutes` have passed; rank 0's clock counts."""
        if self._interval_seconds is None or not self._world.is_main:
            return False
        return time.monotonic() - self._saved_at >= self._interval_seconds

    def should_save(self, state: TrainState, plan: Plan, control: Control) -> bool:
        """Report whether this step is to be saved: when stopping, asked for, the best so far, or due."""
        return control.stop or control.save or state.is_best() or due(state.step, plan.checkpoint, plan.total)

    def save(self, state: TrainState) -> None:
        """Copy `state` and begin to write it. Returns before it is on disk.

        It waits in one case only: a best one waits already, behind another that is being written.
        """
        self._saved_at = time.monotonic()
        if not self._world.is_main:
            return
        if not self._writer.is_alive():
            self._writer.start()
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None or not self._waiting.must_be_written)
            if self._waiting is not None:
                self._report(
                    f"the checkpoint of step {self._waiting.scalars['step']} was left out: {self._folder} is "
                    "written to more slowly than checkpoints fall due; let them be further apart"
                )
                self._free.append(self._waiting.tensors)
                self._waiting = None
            buffers = self._free.pop()
        snapshot = take_snapshot(state, buffers)
        with self._changed:
            self._waiting = snapshot
            self._changed.notify_all()

    def wait(self) -> None:
        """Until all that was saved is on disk. Raises CheckpointFailed where the newest is not."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and self._writing is None)
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._writer.is_alive():
            self._writer.join()  # what was saved before an error is still good

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, name: str) -> tuple[Tensors, dict[str, Any]]:
        try:
            return read_checkpoint(self._folder / name)
        except DamagedCheckpoint as problem:
            raise TrainingError(
                f"rank {self._world.rank} cannot read the checkpoint that rank 0 chose: {problem}"
            ) from None

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                if self._waiting is None:
                    return
                snapshot = self._writing = self._waiting
                self._waiting = None
                self._changed.notify_all()
            failure = self._write(snapshot)
            with self._changed:
                self._writing, self._failure = None, failure
                self._free.append(snapshot.tensors)
                self._changed.notify_all()

    def _write(self, snapshot: Snapshot) -> CheckpointFailed | None:
        step = snapshot.scalars["step"]
        try:
            if snapshot.copied is not None:
                snapshot.copied.synchronize()
            refuse_not_finite(snapshot)
            manifest = {
                "scalars": snapshot.scalars,
                "recipe": self._recipe.model_dump(mode="json"),
                "classes": list(self._classes),
            }
            rows = {
                file: {name: tensor.contiguous() for name, tensor in group.items()}
                for file, group in snapshot.tensors.items()
            }
            folder = folder_of(self._folder, step)
            write_checkpoint(folder, rows, manifest)
            # A better one is there now. Left among the newest, they would be kept in place of good ones.
            remove(damaged for damaged in self._passed_over if damaged != folder)
            self._passed_over = []
            best = snapshot.scalars["best"]
            prune(self._folder, keep=self._recipe.train.keep_checkpoints, also=best and best["step"])
            return None
        except CheckpointFailed as failure:
            problem = failure
        except Exception as error:  # a file system may fail in any way
            words = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            problem = CheckpointFailed(
                f"the checkpoint of step {step} could not be written to {self._folder}: {words}; {self._last()}"
            )
        self._report(str(problem))
        return problem

    def _last(self) -> str:
        kept = list_checkpoints(self._folder)
        return f"the last that is kept is {kept[-1].name}" if kept else "there is no earlier one"


def take_snapshot(state: TrainState, buffers: Tensors) -> Snapshot:
    """Copy a state into `buffers`, which are made where they are missing.

    On a GPU the copies are queued into pinned memory behind the step that made the state, and before the one
    that changes it: the host goes on at once, and the device is held up for the transfer alone.
    """
    on_gpu = False
    tensors: Tensors = {}
    for file, group in state.tensors().items():
        own = buffers.setdefault(file, {})
        tensors[file] = {}
        for name, value in group.items():
            value = value.detach()
            buffer = own.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                # Laid out as the original, so that the copy is one block; the writer turns it into rows.
                buffer = own[name] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            tensors[file][name] = buffer.copy_(value, non_blocking=True)
            on_gpu = on_gpu or value.is_cuda
    copied = None
    if on_gpu:
        copied = torch.cuda.Event()
        copied.record()
    return Snapshot(tensors, state.scalars(), copied, must_be_written=state.is_best())


def refuse_not_finite(snapshot: Snapshot) -> None:
    """Raises CheckpointFailed: a finite loss may still have had gradients that ruined the weights."""
    for file, group in snapshot.tensors.items():
        for name, tensor in group.items():
            if file != "meter" and not _is_finite(tensor):  # its sums are the guard's business
                raise CheckpointFailed(
                    f"the checkpoint of step {snapshot.scalars['step']} was not written: {name} of "
                    f"{file}.safetensors holds values that are not finite"
                )


def _is_finite(tensor: Tensor) -> bool:
    # A sum is finite where all values are, but for an overflow, which the exact test below rules out.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
