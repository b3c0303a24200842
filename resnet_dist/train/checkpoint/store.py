"""The stored checkpoints of a run: find the newest good one, add one, and remove what the recipe does not keep."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from resnet_dist.config import Recipe
from resnet_dist.errors import ExplainedError, StorageError
from resnet_dist.runs.evaluation_results import AWAITS
from resnet_dist.runs.folder import checkpoint_name
from resnet_dist.runs.storage.protocol import Permit, Storage, Unreachable, wait_for_permit
from resnet_dist.train.checkpoint.folder import (
    MODEL_FILE,
    VerifiedCheckpoint,
    list_checkpoints,
    newest_good,
    outdated,
    remove,
    remove_unfinished,
    step_of,
    write_checkpoint,
)
from resnet_dist.train.checkpoint.follow_results import ResultsFollower
from resnet_dist.train.checkpoint.snapshot import CheckpointFailed, Snapshot, refuse_not_finite


class StoredCheckpoints:
    """The checkpoints of one run, on the rank that writes them."""

    def __init__(
        self,
        storage: Storage,
        recipe: Recipe,
        classes: tuple[str, ...],
        flush_metrics: Callable[[], None],
        permit: Permit,
        record: Callable[[int, str | None], None],
        results: ResultsFollower | None,
    ) -> None:
        """Keep the checkpoints in `storage`; the other arguments are as of `Checkpointer`."""
        self._storage, self._recipe, self._classes = storage, recipe, classes
        self._flush_metrics, self._permit = flush_metrics, permit
        self._record, self._results = record, results
        # Damaged and newer than what was restored, or not kept any more; here until the storage has removed them.
        self._unwanted: set[str] = set()

    def newest(self, report: Callable[[str], None]) -> VerifiedCheckpoint | None:
        """Return the newest good checkpoint, or None. Damaged ones are reported, and removed after the next write."""
        wait_for_permit(self._permit)
        remove_unfinished(self._storage)
        found = newest_good(self._storage, report)
        names = list_checkpoints(self._storage)
        self._unwanted = {name for name in names if found is None or name > found.name}
        return found

    def write(self, snapshot: Snapshot) -> None:
        """Add a snapshot to the checkpoints. Raises CheckpointFailed where it is not finite, and what a storage raises."""
        if snapshot.copied is not None:
            snapshot.copied.synchronize()
        refuse_not_finite(snapshot)
        scalars = snapshot.scalars if self._results is None else self._results.completed(snapshot.scalars)
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
        if self._results is not None and scalars.get(AWAITS):
            self._results.add(step)
        checksums = write_checkpoint(self._storage, step, contiguous, manifest, self._permit)
        self._record(step, checksums[MODEL_FILE])
        # Where the storage does not answer now, what is too much is removed after the next checkpoint.
        with suppress(Unreachable):
            self._clean_up(snapshot)

    def _clean_up(self, snapshot: Snapshot) -> None:
        """Remove damaged checkpoints, and those that the recipe does not keep."""
        self._permit.check()
        best = snapshot.scalars["best"]
        also = {best["step"]} if best else set()
        if self._results is not None:
            also = self._results.kept_steps()
        self._unwanted.discard(checkpoint_name(snapshot.scalars["step"]))  # A good one has replaced it.
        # Damaged ones do not count: they would be kept in place of good ones.
        names = [name for name in list_checkpoints(self._storage) if name not in self._unwanted]
        self._unwanted.update(outdated(names, keep=self._recipe.train.keep_checkpoints, also=also))
        # All of them again after a removal that broke off: its checkpoint is not listed any more, but its files may stay.
        remove(self._storage, sorted(self._unwanted))
        for name in sorted(self._unwanted):
            self._record(step_of(name), None)
        self._unwanted.clear()

    def failure_of(self, step: int, error: Exception) -> CheckpointFailed:
        """Return the error to report for a step that `error` has kept from the storage."""
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
