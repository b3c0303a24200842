"""The results of evaluations beside training: a file for each step, written once, from which every reader continues.

The driver writes a file when the checkpoint of its step is evaluated, or when that has failed for good. It is the
journal: a step that has a file is never evaluated again, and its checkpoint may be removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from resnet_dist.errors import StorageError
from resnet_dist.runs.storage.protocol import Storage

RESULTS_FOLDER = "beside"  # in the run folder
AWAITS = "awaits_evaluation"  # the scalar of a checkpoint that is to be evaluated


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of a step: its metrics, or the problem for which there are none."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None

    def __str__(self) -> str:
        return f"step {self.step}" + (f" ({self.problem})" if self.problem is not None else "")


class EvaluationResults:
    """The results of one run, by step. Files that were read once are not read again."""

    def __init__(self, run: Storage) -> None:
        self._storage = run.at(RESULTS_FOLDER)
        self._known: dict[str, Evaluated] = {}

    def read(self) -> list[Evaluated]:
        """Return the results so far, in the order of their steps.

        Raises StorageError where they cannot be read; a damaged file is named.
        """
        for found in self._storage.objects():
            if found.name.endswith(".json") and found.name not in self._known:
                content = self._storage.read(found.name)
                if content is not None:
                    self._known[found.name] = self._parsed(found.name, content)
        return sorted(self._known.values(), key=lambda one: one.step)

    def _parsed(self, name: str, content: bytes) -> Evaluated:
        try:
            found = Evaluated(**json.loads(content))
            return Evaluated(
                int(found.step), {key: float(value) for key, value in found.metrics.items()}, found.problem
            )
        except (ValueError, TypeError, AttributeError):
            raise StorageError(
                f"{self._storage.location}/{name}: a damaged result of an evaluation; remove it, and the step is evaluated "
                "again if its checkpoint is still there"
            ) from None

    def write(self, result: Evaluated) -> None:
        """Record a result; one that is there already stays. Raises StorageError."""
        self._storage.create(
            f"step-{result.step:08d}.json", (json.dumps(asdict(result), indent=1) + "\n").encode()
        )


def failed_evaluations(run: Storage) -> list[Evaluated]:
    """Return the evaluations of a run that have failed for good, in the order of their steps. Raises StorageError."""
    return [one for one in EvaluationResults(run).read() if one.problem is not None]
