"""The results of evaluations beside training: a file for each step, written once, from which every reader continues.

The driver writes a file when the checkpoint of its step is evaluated, or when that has failed for good. It is the
journal: a step that has a file is never evaluated again, and its checkpoint may be removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from resnet_dist.runs.storage.protocol import Storage

RESULTS_FOLDER = "beside"  # in the run folder
AWAITS = "awaits_evaluation"  # the scalar of a checkpoint that is to be evaluated


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of a step: its metrics, or the problem for which there are none."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None


class EvaluationResults:
    """The results of one run, by step. Files that were read once are not read again."""

    def __init__(self, run: Storage) -> None:
        self._storage = run.at(RESULTS_FOLDER)
        self._known: dict[str, Evaluated] = {}

    def read(self) -> list[Evaluated]:
        """Return the results so far, in the order of their steps. Raises StorageError."""
        for found in self._storage.objects():
            if found.name.endswith(".json") and found.name not in self._known:
                content = self._storage.read(found.name)
                if content is not None:
                    self._known[found.name] = Evaluated(**json.loads(content))
        return sorted(self._known.values(), key=lambda one: one.step)

    def write(self, result: Evaluated) -> None:
        """Record a result; one that is there already stays. Raises StorageError."""
        self._storage.create(
            f"step-{result.step:08d}.json", (json.dumps(asdict(result), indent=1) + "\n").encode()
        )
