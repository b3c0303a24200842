"""Evaluate the checkpoints of a run in a process of its own, while its ranks train on.

The process is an actor with a part of a node to itself, started before the ranks, which leave that part free. It has one
checkpoint at a time, the oldest that awaits its evaluation; results go to the run's storage, see runs/evaluations.py.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from resnet_dist.launch.on_ray.settings import set_defaults

set_defaults()

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from resnet_dist.config import Recipe
from resnet_dist.errors import RankFailed, StorageError
from resnet_dist.launch.on_ray.nodes import Placer, Reserved, free_resources, nodes, room_beside
from resnet_dist.runs.evaluations import Evaluated, EvaluationResults
from resnet_dist.runs.folder import RunFolder, checkpoint_name
from resnet_dist.runs.page import EVALUATIONS_FOLDER, predictions_file
from resnet_dist.tracking.spool import Spool, evaluated_steps
from resnet_dist.train.checkpoint.evaluated import awaiting, record_results
from resnet_dist.train.loop import Outcome

MAX_TRIES = 3  # of the evaluation of one checkpoint
START_SECONDS = 60.0  # for the actor to have its place
FINISH_POLL_SECONDS, NODE_SECONDS = 0.2, 5.0
WAIT_SECONDS = 600.0  # for a place, once the ranks have ended


class Evaluator:
    """The actor: it imports torch once, and keeps the loader of the evaluation set between calls."""

    def __init__(self, recipe_json: str, cpus: int, *, gpu: bool) -> None:
        from resnet_dist.launch.evaluator import CheckpointEvaluator  # Here, since it imports torch.

        self._evaluator = CheckpointEvaluator(Recipe.from_json(recipe_json), cpus, gpu=gpu)

    def ready(self) -> None:
        """Return when the process has started."""

    def evaluate(self, location: str) -> tuple[dict[str, float], bytes | None]:
        """Return the metrics of a checkpoint, and its predictions where the recipe wants their figures."""
        return self._evaluator.evaluate(location)


class BesideEvaluations:
    """The evaluations beside one run, as its driver sees them. It never waits but in `start` and `finish`."""

    def __init__(self, recipe: Recipe, report: Callable[[str], None], *, gpu: bool) -> None:
        """Prepare to evaluate. gpu: the ranks have GPUs."""
        self.part: Reserved | None = None  # that the process has; None while there is none
        self.recipe, self.report, self._gpu = recipe, report, gpu
        self._actor: Any = None
        self._call: tuple[int, Any] | None = None  # a step, and the result that is to come
        self._failures: Counter[int] = Counter()
        self._look_at = -math.inf

    def start(self, sizes: Sequence[int], cpus: int | None, give_up: Callable[[], bool]) -> str | None:
        """Start the process unless it runs, beside ranks in one of these numbers; return why it does not run.

        sizes, cpus: as of `choose_placement`; no sizes: there are no ranks.
        """
        if self.part is not None and self.part.node_id in {node.node_id for node in nodes()}:
            return None
        self.close()
        part = room_beside(nodes(), sizes, cpus, gpu=self._gpu)
        if part is None:
            return f"no CPU is left beside the ranks ({free_resources()} are free)"
        # On that node alone: elsewhere it would take the place of a rank.
        place = NodeAffinitySchedulingStrategy(part.node_id, soft=False)
        options = {"num_cpus": part.cpus, "num_gpus": part.gpus, "max_restarts": -1}
        made = ray.remote(Evaluator).options(**options, scheduling_strategy=place)
        self._actor = made.remote(self.recipe.to_json(), part.cpus, gpu=part.gpus > 0)
        problem = self._problem_of_start(give_up)
        if problem is not None:
            self.close()
            return problem
        self.part = part
        if self.recipe.train.precision == "fp16" and not part.gpus:
            self.report("evaluations beside training are in fp32: train.precision='fp16' needs a GPU")
        return None

    def _problem_of_start(self, give_up: Callable[[], bool]) -> str | None:
        """Wait until the process runs; return why it does not."""
        ready, deadline = self._actor.ready.remote(), time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and not give_up():
            done, _ = ray.wait([ready], timeout=FINISH_POLL_SECONDS)
            if not done:
                continue
            try:
                ray.get(ready)
                return None
            except Exception as error:  # The process was lost, or cannot read the data.
                return f"it cannot start: {reason_of(error)}"
        return f"it has no place after {START_SECONDS:.0f} s ({free_resources()} are free)"

    def close(self) -> None:
        """End the process; an evaluation that is under way is dropped, and made again by the next one."""
        if self._actor is not None:
            ray.kill(self._actor)
        self._actor = self._call = self.part = None

    def look(self, folder: RunFolder) -> bool:
        """Take a result that has come, and begin the next evaluation; report whether one is under way."""
        if self._call is not None:
            done, _ = ray.wait([self._call[1]], timeout=0)
            if done:
                self._take(folder, *self._call)
        elif self._actor is not None and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + folder.storage.poll_seconds
            with suppress(StorageError):  # The next look may succeed.
                self._begin(folder)
        return self._call is not None

    def finish(self, folder: RunFolder, give_up: Callable[[], bool]) -> bool:
        """Wait until no evaluation is outstanding; return False where `give_up()` returned true first.

        Raises StorageError where the storage does not answer, RankFailed where the cluster has no room for WAIT_SECONDS.
        """
        left, since, look_at = outstanding(folder), time.monotonic(), 0.0
        if left:
            self.report(f"{len(left)} evaluation(s) are outstanding, of steps {', '.join(map(str, left))}")
        while left or self._call is not None:
            if give_up():
                return False
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + NODE_SECONDS
                self._find_place(since, give_up)
            if not self.look(folder):
                left = outstanding(folder)
            time.sleep(FINISH_POLL_SECONDS)
        return True

    def _find_place(self, since: float, give_up: Callable[[], bool]) -> None:
        """Start the process again where its node is gone, now that no rank needs room. Raises RankFailed in time."""
        problem = self.start((), None, give_up)
        if problem is not None and time.monotonic() - since >= WAIT_SECONDS:
            raise RankFailed(f"no evaluation could begin in {WAIT_SECONDS:.0f} s: {problem}")

    def _begin(self, folder: RunFolder) -> None:
        if left := outstanding(folder):
            location = f"{folder.checkpoints.location}/{checkpoint_name(left[0])}"
            self._call = left[0], self._actor.evaluate.remote(location)

    def _take(self, folder: RunFolder, step: int, call: Any) -> None:
        """Record the result of a step, or that it failed for good; otherwise it is tried again."""
        try:
            metrics, predictions = ray.get(call)
        except Exception as error:  # A lost process, or whatever the evaluation has raised.
            self._failed(folder, step, reason_of(error))
            return
        try:
            folder.check_lease()
            if predictions is not None:
                folder.storage.at(EVALUATIONS_FOLDER).write(predictions_file(step), predictions)
            EvaluationResults(folder.storage).write(Evaluated(step, metrics))
            self._call = None
        except StorageError:  # The call keeps its result: the next look writes it.
            return

    def _failed(self, folder: RunFolder, step: int, reason: str) -> None:
        self._failures[step] += 1
        count = self._failures[step]
        if count < MAX_TRIES:
            self._call = None
            self.report(
                f"the evaluation of step {step} failed ({reason}); it is tried again ({count + 1} of {MAX_TRIES})"
            )
            return
        with suppress(StorageError):
            folder.check_lease()
            EvaluationResults(folder.storage).write(Evaluated(step, {}, reason))
            self._call = None
            self.report(f"the checkpoint of step {step} is not evaluated: {reason}")


def outstanding(folder: RunFolder) -> Sequence[int]:
    """Return the steps whose checkpoints await an evaluation, the oldest first. Raises StorageError."""
    done = {result.step for result in EvaluationResults(folder.storage).read()}
    return awaiting(folder.checkpoints, done)


def reason_of(error: BaseException) -> str:
    """Return the cause of an error of Ray, in one line."""
    cause = getattr(error, "cause", None)
    shown = cause if isinstance(cause, BaseException) else error
    return next(iter(str(shown).strip().splitlines()), type(shown).__name__)


def started(
    beside: BesideEvaluations,
    folder: RunFolder,
    placer: Placer,
    cpus: int | None,
    give_up: Callable[[], bool],
) -> BesideEvaluations | None:
    """Start the evaluations beside an attempt; return None where there is no room, and the ranks evaluate themselves.

    What an earlier attempt has left is then evaluated first, so that metrics come in the order of their steps.
    """
    problem = beside.start(placer.sizes, cpus, give_up)
    placer.reserved = beside.part
    if problem is None:
        return beside
    beside.report(f"train.evaluate='beside': {problem}: the ranks evaluate")
    if outstanding(folder) and beside.finish(folder, give_up):
        complete(folder, beside.recipe)
    beside.close()
    return None


def settle(
    beside: BesideEvaluations, folder: RunFolder, outcome: Outcome | None, give_up: Callable[[], bool]
) -> Outcome | None:
    """Wait for the evaluations of ranks that have reached their end, and complete the record of their run.

    Return the outcome with the newest metrics; it is not finished where `give_up()` returned true first.
    """
    if outcome is None or not outcome.finished:
        return outcome
    if not beside.finish(folder, give_up):
        return replace(outcome, finished=False)
    return replace(outcome, metrics={**outcome.metrics, **complete(folder, beside.recipe)})


def complete(folder: RunFolder, recipe: Recipe) -> dict[str, float]:
    """Log the results that the ranks have not logged, and put the best into the newest checkpoint; no rank may run.

    Return the metrics of the newest result.
    """
    results = EvaluationResults(folder.storage).read()
    folder.check_lease()
    done = evaluated_steps(folder.spool)
    left = [one for one in results if one.problem is None and one.step not in done]
    if left:
        with Spool(folder.spool, LeasePermit(folder)) as spool:
            for result in left:
                spool.log(dict(result.metrics), result.step)
    newest = next((dict(one.metrics) for one in reversed(results) if one.problem is None), {})
    if results:
        train = recipe.train
        record_results(folder.checkpoints, results, train.best_metric, keep=train.keep_checkpoints)
    return newest


class LeasePermit:
    """The Permit of a driver: it writes while it holds the run."""

    decides = False

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def check(self, recent_seconds: float = 0.0) -> None:
        """Return where this driver holds the run. Raises Superseded."""
        self._folder.check_lease()
