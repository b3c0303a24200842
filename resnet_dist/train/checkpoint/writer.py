"""Save the state without making the loop wait: copy it to host memory, and let a thread write the copy.

At most two copies exist: one being written, and one waiting. A newer copy replaces the one that waits, so a slow disk
costs intermediate checkpoints, never the last. A storage that does not answer is tried again, while training continues.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from resnet_dist.config import Recipe
from resnet_dist.errors import ExplainedError, StorageError, Superseded, TrainingError
from resnet_dist.runs.evaluations import AWAITS
from resnet_dist.runs.folder import checkpoint_name
from resnet_dist.runs.storage.protocol import ALWAYS, Permit, Storage, Unreachable, wait_for_permit
from resnet_dist.train.beside import Beside
from resnet_dist.train.checkpoint.folder import (
    MODEL_FILE,
    DamagedCheckpoint,
    Tensors,
    fetch_checkpoint,
    list_checkpoints,
    newest_good,
    prune,
    remove,
    remove_unfinished,
    step_of,
    write_checkpoint,
)
from resnet_dist.train.plan import Plan, due
from resnet_dist.train.state.train_state import TrainState
from resnet_dist.train.watch.control import Control
from resnet_dist.world import World

# A storage that does not answer: reported after this time, and given up for this checkpoint after that. A process that
# ends has less patience.
REPORT_SECONDS, PATIENCE_SECONDS, CLOSING_PATIENCE_SECONDS = 60.0, 300.0, 15.0
RETRY_SECONDS = 2.0  # between two tries, each of which has retries of its own


class CheckpointFailed(TrainingError):
    """A checkpoint that could not be written."""


@dataclass(frozen=True)
class Snapshot:
    """A state at one step, in host memory."""

    tensors: Tensors
    scalars: dict[str, Any]
    copied: torch.cuda.Event | None  # on a GPU: recorded after the copies
    must_be_written: bool  # the best so far, or to be evaluated: no later one may replace it


class Checkpointer:
    """The checkpoints of one run. Rank 0 writes; all ranks call `restore` and `save`."""

    def __init__(
        self,
        storage: Storage,
        recipe: Recipe,
        classes: tuple[str, ...],
        world: World,
        report: Callable[[str], None],
        flush_metrics: Callable[[], None] = lambda: None,
        permit: Permit = ALWAYS,
        record: Callable[[int, str | None], None] = lambda step, sha256: None,
        beside: Beside | None = None,
    ) -> None:
        """Keep the checkpoints in `storage`. `permit` is asked before anything is written or removed.

        report, flush_metrics, record: called from the writer's thread too. flush_metrics: called before a checkpoint
        appears, because a run that resumes there does not log again what came before. record: called with the step of
        each checkpoint that was written, and the SHA-256 of its model, or None where one was removed. beside: on rank 0,
        the evaluations that another process makes of these checkpoints.
        """
        self._storage, self._recipe, self._classes, self._world = storage, recipe, classes, world
        self._report, self._flush_metrics, self._permit = report, flush_metrics, permit
        self._record, self._beside = record, beside
        minutes = recipe.train.checkpoint_minutes
        self._interval_seconds = None if minutes is None else 60 * minutes
        self._saved_at = time.monotonic()
        self._free: list[Tensors] = [{}, {}]  # buffers of snapshots, filled at first use
        self._waiting: Snapshot | None = None
        self._writing: Snapshot | None = None
        self._failure: CheckpointFailed | Superseded | None = None  # the error of the newest write
        self._refusal = ""  # why the storage has not taken the checkpoint that is being written
        self._damaged: list[str] = []  # newer than what was restored
        self._closing = False
        self._changed = threading.Condition()
        # A daemon thread: a disk that hangs forever must not keep the process alive.
        self._writer = threading.Thread(target=self._write_all, name="checkpoint", daemon=True)

    def restore(self, state: TrainState) -> bool:
        """Load the newest good checkpoint on every rank; return False where there is none.

        Damaged ones are reported and skipped. Rank 0 chooses, so that all ranks load the same.
        """
        found = None
        if self._world.is_main:
            wait_for_permit(self._permit)
            remove_unfinished(self._storage)
            found = newest_good(self._storage, self._report)
            self._damaged = [c for c in list_checkpoints(self._storage) if not found or c > found.name]
        name = self._world.broadcast(found.name if found else None)
        if name is None:
            return False
        if found is not None:
            tensors, manifest = found.tensors, found.manifest
        else:
            tensors, manifest = self._read(name)
        state.load(tensors, manifest["scalars"], self._world)
        return True

    def due_by_time(self) -> bool:
        """Report whether `train.checkpoint_minutes` have passed on rank 0's clock; False on all other ranks."""
        if self._interval_seconds is None or not self._world.is_main:
            return False
        return time.monotonic() - self._saved_at >= self._interval_seconds

    def should_save(self, state: TrainState, plan: Plan, control: Control) -> bool:
        """Report whether to save this step: the run stops, a save was requested, it is the best so far, or due."""
        return control.stop or control.save or state.is_best() or due(state.step, plan.checkpoint, plan.total)

    def save(self, state: TrainState, *, awaits_evaluation: bool = False) -> None:
        """Copy `state` and begin to write it. Returns before it is on disk.

        It waits in one case only: while one is being written, the best so far is waiting already, or one that is to be
        evaluated. awaits_evaluation: another process evaluates this one.
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
                    f"the checkpoint of step {self._waiting.scalars['step']} was skipped: {self._delay()}"
                )
                self._free.append(self._waiting.tensors)
                self._waiting = None
            buffers = self._free.pop()
        snapshot = take_snapshot(state, buffers, awaits_evaluation=awaits_evaluation)
        with self._changed:
            self._waiting = snapshot
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all that was saved is on disk. Raises CheckpointFailed or Superseded where the newest is not."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and self._writing is None)
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._writer.is_alive():
            self._writer.join()  # after an error too: what was saved before it is good

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _delay(self) -> str:
        """Return why a checkpoint is still being written when the next one is due."""
        if self._refusal:
            return f"the storage has not taken the one before it yet ({self._refusal})"
        return (
            f"writing to {self._storage.location} takes longer than the interval between checkpoints; use a longer "
            "interval, where the storage is well"
        )

    def _read(self, name: str) -> tuple[Tensors, dict[str, Any]]:
        try:
            found = fetch_checkpoint(self._storage, name)
            return found.tensors, found.manifest
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
            self._refusal = ""
            with self._changed:
                self._writing, self._failure = None, failure
                self._free.append(snapshot.tensors)
                self._changed.notify_all()

    def _write(self, snapshot: Snapshot) -> CheckpointFailed | Superseded | None:
        """Write one snapshot, again and again where the storage does not answer; return the failure."""
        step, since, reported = snapshot.scalars["step"], time.monotonic(), False
        problem: CheckpointFailed | Superseded
        while True:
            try:
                self._write_once(snapshot)
                if reported:
                    self._report(f"the checkpoint of step {step} is written; the storage answers again")
                return None
            except (CheckpointFailed, Superseded) as failure:
                problem = failure
                break
            except Exception as error:  # a file system may raise anything
                seconds = time.monotonic() - since
                problem, self._refusal = self._failure_of(step, error), str(error)
                if not isinstance(error, Unreachable) or not self._may_retry(snapshot, seconds):
                    break
                if seconds >= REPORT_SECONDS and not reported:
                    self._report(f"{problem}; training continues, and it is tried again")
                    reported = True
        self._report(str(problem))
        return problem

    def _may_retry(self, snapshot: Snapshot, seconds: float) -> bool:
        """Wait, and report whether to try again after `seconds` without success: no newer one is to be written."""

        def is_superseded() -> bool:
            newer = self._waiting
            return newer is not None and (newer.must_be_written or not snapshot.must_be_written)

        with self._changed:
            self._changed.wait_for(is_superseded, RETRY_SECONDS)
            patience = CLOSING_PATIENCE_SECONDS if self._closing else PATIENCE_SECONDS
            return not is_superseded() and seconds < patience

    def _write_once(self, snapshot: Snapshot) -> None:
        if snapshot.copied is not None:
            snapshot.copied.synchronize()
        refuse_not_finite(snapshot)
        scalars = snapshot.scalars if self._beside is None else self._beside.completed(snapshot.scalars)
        manifest = {
            "scalars": scalars,
            "recipe": self._recipe.public().model_dump(mode="json"),
            "classes": list(self._classes),
        }
        contiguous = {
            file: {name: tensor.contiguous() for name, tensor in group.items()}
            for file, group in snapshot.tensors.items()
        }
        step = snapshot.scalars["step"]
        self._flush_metrics()
        if self._beside is not None and scalars.get(AWAITS):
            self._beside.add(step)
        checksums = write_checkpoint(self._storage, step, contiguous, manifest, self._permit)
        self._record(step, checksums[MODEL_FILE])
        # What is too much is removed after the next checkpoint, where the storage does not answer now.
        with suppress(Unreachable):
            self._clean_up(snapshot)

    def _clean_up(self, snapshot: Snapshot) -> None:
        """Remove damaged checkpoints, and those that the recipe does not keep."""
        step = snapshot.scalars["step"]
        self._permit.check()
        # Remove damaged ones, now that a good one is written: `prune` would keep them in place of good ones.
        damaged = [name for name in self._damaged if name != checkpoint_name(step)]
        remove(self._storage, damaged)
        self._damaged = []
        best = snapshot.scalars["best"]
        also = {best["step"]} if best else set()
        if self._beside is not None:
            also = self._beside.kept_steps()
        old = prune(self._storage, keep=self._recipe.train.keep_checkpoints, also=also)
        for name in (*damaged, *old):
            self._record(step_of(name), None)

    def _failure_of(self, step: int, error: Exception) -> CheckpointFailed:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        if isinstance(error, ExplainedError):
            reason = str(error)
        return CheckpointFailed(
            f"the checkpoint of step {step} could not be written to {self._storage.location}: {reason}"
            f"{self._last_kept()}"
        )

    def _last_kept(self) -> str:
        try:
            kept = list_checkpoints(self._storage)
        except StorageError:
            return "; those before it stay"
        return f"; the last that is kept is {kept[-1]}" if kept else "; there is no earlier one"


def take_snapshot(state: TrainState, buffers: Tensors, *, awaits_evaluation: bool = False) -> Snapshot:
    """Copy a state into `buffers`, and create those that are missing.

    On a GPU the copies into pinned memory are queued after the step that made the state and before the one that
    changes it: the host continues at once, and the device is delayed by the transfer alone.
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
                # Keep the original's memory layout, so that the copy is one block; the writer makes it contiguous.
                buffer = own[name] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            tensors[file][name] = buffer.copy_(value, non_blocking=True)
            on_gpu = on_gpu or value.is_cuda
    copied = None
    if on_gpu:
        copied = torch.cuda.Event()
        copied.record()
    scalars = state.scalars() | ({AWAITS: True} if awaits_evaluation else {})
    return Snapshot(tensors, scalars, copied, must_be_written=state.is_best() or awaits_evaluation)


def refuse_not_finite(snapshot: Snapshot) -> None:
    """Raise CheckpointFailed where a tensor is not finite: gradients may ruin weights though the loss is finite."""
    for file, group in snapshot.tensors.items():
        for name, tensor in group.items():
            if file != "meter" and not _is_finite(tensor):  # the guard has checked the meter's sums
                raise CheckpointFailed(
                    f"the checkpoint of step {snapshot.scalars['step']} was not written: {name} of "
                    f"{file}.safetensors holds values that are not finite"
                )


def _is_finite(tensor: Tensor) -> bool:
    # A finite sum proves that all values are finite, at once. Any other sum may be an overflow: test every value.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
