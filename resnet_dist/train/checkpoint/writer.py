"""Save the state without making the loop wait: copy it to host memory, and let a thread write the copy.

At most two copies exist: one being written, and one waiting. A newer copy replaces the one that waits, so a slow disk
costs intermediate checkpoints, never the last. A storage that does not answer is tried again, while training continues.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from resnet_dist.config import Recipe
from resnet_dist.errors import Superseded, TrainingError
from resnet_dist.runs.storage.protocol import ALWAYS, Permit, Storage, Unreachable
from resnet_dist.train.checkpoint.folder import DamagedCheckpoint, Tensors, fetch_checkpoint
from resnet_dist.train.checkpoint.follow_results import ResultsFollower
from resnet_dist.train.checkpoint.snapshot import CheckpointFailed, Snapshot, take_snapshot
from resnet_dist.train.checkpoint.store import StoredCheckpoints
from resnet_dist.train.plan import Plan, due
from resnet_dist.train.state.train_state import TrainState
from resnet_dist.train.watch.control import Control
from resnet_dist.world import World

# A storage that does not answer: reported after this time, and given up for this checkpoint after that. A process that
# ends has less patience.
REPORT_SECONDS, PATIENCE_SECONDS, CLOSING_PATIENCE_SECONDS = 60.0, 300.0, 15.0
RETRY_SECONDS = 2.0  # between two tries, each of which has retries of its own


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
        results: ResultsFollower | None = None,
    ) -> None:
        """Keep the checkpoints in `storage`. `permit` is asked before anything is written or removed.

        report, flush_metrics, record: called from the writer's thread too. flush_metrics: called before a checkpoint
        appears, because a run that resumes there does not log again what came before. record: called with the step of
        each checkpoint that was written, and the SHA-256 of its model, or None where one was removed. results: on rank 0,
        the evaluations that another process makes of these checkpoints.
        """
        self._storage, self._world, self._report = storage, world, report
        self._stored = StoredCheckpoints(storage, recipe, classes, flush_metrics, permit, record, results)
        minutes = recipe.train.checkpoint_minutes
        self._interval_seconds = None if minutes is None else 60 * minutes
        self._saved_at = time.monotonic()
        self._free: list[Tensors] = [{}, {}]  # buffers of snapshots, filled at first use
        self._waiting: Snapshot | None = None
        self._writing: Snapshot | None = None
        self._failure: CheckpointFailed | Superseded | None = None  # the error of the newest write
        self._refusal = ""  # why the storage has not taken the checkpoint that is being written
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
            found = self._stored.newest(self._report)
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
                self._stored.write(snapshot)
                if reported:
                    self._report(f"the checkpoint of step {step} is written; the storage answers again")
                return None
            except (CheckpointFailed, Superseded) as failure:
                problem = failure
                break
            except Exception as error:  # a file system may raise anything
                seconds = time.monotonic() - since
                problem, self._refusal = self._stored.failure_of(step, error), str(error)
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
