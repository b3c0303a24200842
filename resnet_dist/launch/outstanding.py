"""The evaluations beside training that are outstanding: which they are, where their results go, how their record ends.

A driver calls this while no rank runs, and while ranks leave evaluations to another process.
"""

from __future__ import annotations

from collections.abc import Sequence

from resnet_dist.runs.evaluation_results import Evaluated, EvaluationResults
from resnet_dist.runs.folder import RunFolder, checkpoint_name
from resnet_dist.runs.page import EVALUATIONS_FOLDER, predictions_file
from resnet_dist.tracking.spool import Spool, evaluated_steps
from resnet_dist.train.checkpoint.awaiting import awaiting, record_results
from resnet_dist.train.checkpoint.folder import step_of

# Metrics of a checkpoint, its predictions where the recipe wants their figures, and lines for a person.
Evaluation = tuple[dict[str, float], bytes | None, list[str]]


class Journal:
    """The results of the evaluations beside one run. What was read once is not read again."""

    def __init__(self, folder: RunFolder, best_metric: str | None, keep_checkpoints: int) -> None:
        self.folder, self._best_metric, self._keep = folder, best_metric, keep_checkpoints
        self._results = EvaluationResults(folder.storage)

    def outstanding(self) -> Sequence[int]:
        """Return the steps whose checkpoints await an evaluation, the oldest first. Raises StorageError."""
        done = {result.step for result in self._results.read()}
        return awaiting(self.folder.checkpoints, done)

    def location_of(self, step: int) -> str:
        return f"{self.folder.checkpoints.location}/{checkpoint_name(step)}"

    def write(self, step: int, evaluation: Evaluation) -> None:
        """Record an evaluation. Raises StorageError."""
        metrics, predictions, _ = evaluation
        self.folder.check_lease()
        if predictions is not None:
            self.folder.storage.at(EVALUATIONS_FOLDER).write(predictions_file(step), predictions)
        self._results.write(Evaluated(step, metrics))

    def write_problem(self, step: int, problem: str) -> None:
        """Record that there is no evaluation of this step, and never will be. Raises StorageError."""
        self.folder.check_lease()
        self._results.write(Evaluated(step, {}, problem))

    def complete(self) -> dict[str, float]:
        """Log the results that the ranks have not logged, and put the best into the newest checkpoint; no rank may run.

        Return the metrics of the newest result, unless a newer step was evaluated by the ranks. Raises StorageError.
        """
        results = self._results.read()
        if not results:
            return {}
        self.folder.check_lease()
        done = evaluated_steps(self.folder.spool)
        good = [one for one in results if one.problem is None]
        if left := [one for one in good if one.step not in done]:
            with self._spool() as spool:
                for result in left:
                    spool.log(dict(result.metrics), result.step)
        is_newest = bool(good) and good[-1].step >= max(done, default=0)
        newest = dict(good[-1].metrics) if is_newest else {}
        removed = record_results(self.folder.checkpoints, good, newest, self._best_metric, keep=self._keep)
        if removed:  # The tracker shows them as models.
            with self._spool() as spool:
                for name in removed:
                    spool.log_checkpoint(step_of(name), None)
        return newest

    def _spool(self) -> Spool:
        return Spool(self.folder.spool, LeasePermit(self.folder))


class LeasePermit:
    """The Permit of a driver: it writes while it holds the run."""

    decides = False

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def check(self, recent_seconds: float = 0.0) -> None:
        """Return where this driver holds the run. Raises Superseded."""
        self._folder.check_lease()
