"""Evaluate the checkpoints of a run in a process of its own, while its ranks train on.

The process is an actor with a part of a node to itself, started before the ranks, which leave that part free. It has one
checkpoint at a time, the oldest that awaits its evaluation; results go to the run's storage, see launch/outstanding.py.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from resnet_dist.launch.on_ray.settings import set_defaults

set_defaults()

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from resnet_dist.config import Recipe
from resnet_dist.errors import ExplainedError, RankFailed, StorageError
from resnet_dist.launch.on_ray.nodes import (
    Node,
    Placer,
    Reserved,
    free_parts,
    free_resources,
    keeps_number,
    nodes,
    room_beside,
)
from resnet_dist.launch.outstanding import Evaluation, Journal
from resnet_dist.runs.folder import RunFolder
from resnet_dist.train.loop import Outcome

MAX_TRIES = 3  # of the evaluation of one checkpoint, and of the start of the process
START_SECONDS = 60.0  # for the actor to have its place
FINISH_POLL_SECONDS, NODE_SECONDS = 0.2, 5.0
WAIT_SECONDS = 600.0  # for a place, once the ranks have ended


class Evaluator:
    """The actor: it imports torch once, and keeps the loader of the evaluation set between calls."""

    def __init__(self, recipe_json: str, cpus: int, *, gpu: bool) -> None:
        from resnet_dist.launch.checkpoint_evaluator import (
            CheckpointEvaluator,
        )  # Here, since it imports torch.

        self._evaluator = CheckpointEvaluator(Recipe.from_json(recipe_json), cpus, gpu=gpu)

    def ready(self) -> None:
        """Return when the process has started."""

    def evaluate(self, location: str) -> Evaluation:
        """Return the evaluation of a checkpoint."""
        return self._evaluator.evaluate(location)


@dataclass(frozen=True)
class NotStarted:
    """Why the process does not run. is_lasting: not for want of room, so that waiting does not help."""

    reason: str
    is_lasting: bool = False


class CannotEvaluate(RankFailed):
    """A process that cannot start, wherever it has room."""


class BesideEvaluations:
    """The evaluations beside one run, as its driver sees them. It never waits but in `start` and `finish`."""

    def __init__(self, recipe: Recipe, report: Callable[[str], None], *, gpu: bool) -> None:
        """Prepare to evaluate. gpu: the ranks have GPUs."""
        self.part: Reserved | None = None  # that the process has; None while there is none
        self.recipe, self.report, self._gpu = recipe, report, gpu
        self._actor: Any = None
        self._ready: Any = None  # the answer of an actor that is not known to run; None where it runs
        self._ready_by = math.inf
        self._call: tuple[int, Any] | None = None  # a step, and the result that is to come
        self._loss: tuple[int, str] | None = None  # a step whose process was lost, and why
        self._ranks: tuple[Sequence[int], int | None] = ((), None)  # beside which the process has its part
        self._failures: Counter[int] = Counter()
        self._start_failures = 0
        self._is_on, self._look_at = False, -math.inf
        self._journal: Journal | None = None
        self._problem = ""  # of the storage, as it was reported

    def journal(self, folder: RunFolder) -> Journal:
        """Return the results of this run, which stays the same over its attempts."""
        if self._journal is None:
            train = self.recipe.train
            self._journal = Journal(folder, train.best_metric, train.keep_checkpoints)
        self._journal.folder = folder
        return self._journal

    def start(self, sizes: Sequence[int], cpus: int | None, give_up: Callable[[], bool]) -> NotStarted | None:
        """Start the process unless it runs, beside ranks in one of these numbers; return why it does not run.

        sizes, cpus: as of `choose_placement`; no sizes: there are no ranks.
        """
        alive, self._ranks = nodes(), (sizes, cpus)
        if self.part is not None and self._ready is None and self._may_stay(self.part, alive):
            return None
        self.close()
        if not self._place(alive):
            return NotStarted(f"no CPU is left beside the ranks ({free_resources()} are free)")
        problem = self._problem_of_start(give_up)
        if problem is None:
            self._ready, self._is_on, self._start_failures = None, True, 0
        else:
            self.close()
        return problem

    def _may_stay(self, part: Reserved, alive: Sequence[Node]) -> bool:
        is_there = part.node_id in {node.node_id for node in alive}
        return is_there and keeps_number(part, alive, *self._ranks, gpu=self._gpu)

    def _place(self, alive: Sequence[Node], free: Sequence[Node] | None = None) -> bool:
        """Begin to start the process beside the ranks; return False where there is no room."""
        part = room_beside(alive, *self._ranks, gpu=self._gpu, free=free)
        if part is None:
            return False
        # On that node alone: elsewhere it would take the place of a rank.
        place = NodeAffinitySchedulingStrategy(part.node_id, soft=False)
        options = {"num_cpus": part.cpus, "num_gpus": part.gpus, "max_restarts": -1}
        made = ray.remote(Evaluator).options(**options, scheduling_strategy=place)
        self._actor = made.remote(self.recipe.to_json(), part.cpus, gpu=part.gpus > 0)
        self.part = part
        self._await_process()
        return True

    def _await_process(self) -> None:
        self._ready, self._ready_by = self._actor.ready.remote(), time.monotonic() + START_SECONDS

    def _problem_of_start(self, give_up: Callable[[], bool]) -> NotStarted | None:
        """Wait until the process runs; return why it does not."""
        while time.monotonic() < self._ready_by:
            if give_up():
                return NotStarted("interrupted")
            done, _ = ray.wait([self._ready], timeout=FINISH_POLL_SECONDS)
            if not done:
                continue
            try:
                ray.get(self._ready)
                return None
            except Exception as error:  # The process was lost, or cannot read the data.
                return NotStarted(f"it cannot start: {reason_of(error)}", is_lasting=True)
        return NotStarted(f"it has no place after {START_SECONDS:.0f} s ({free_resources()} are free)")

    def close(self) -> None:
        """End the process; an evaluation that is under way is dropped, and made again by the next one."""
        self._is_on = False
        self._drop()

    def _drop(self) -> None:
        """End the process, which another one may follow."""
        if self._actor is not None:
            ray.kill(self._actor)
        self._actor = self._ready = self._call = self._loss = self.part = None

    def look(self, folder: RunFolder) -> bool:
        """Take a result that has come, and begin the next evaluation; report whether one is under way.

        A process that was lost is waited for, and started elsewhere once its node is gone.
        """
        try:
            if self._call is not None:
                done, _ = ray.wait([self._call[1]], timeout=0)
                if done:
                    self._take(folder, *self._call)
            elif self._is_on and time.monotonic() >= self._look_at:
                self._look_at = time.monotonic() + folder.storage.poll_seconds
                self._next(folder)
        except StorageError as error:  # The next look may succeed: a call keeps its result.
            if str(error) != self._problem:
                self._problem = str(error)
                self.report(f"evaluations beside training wait for the storage: {error}")
        return self._call is not None

    def _next(self, folder: RunFolder) -> None:
        if self._actor is None:
            alive = nodes()
            if not self._place(alive, free_parts(alive)):
                self._look_at = time.monotonic() + NODE_SECONDS
        elif self._ready is not None:
            self._look_for_process(folder)
        else:
            journal = self.journal(folder)
            if left := journal.outstanding():
                self._call = left[0], self._actor.evaluate.remote(journal.location_of(left[0]))

    def _look_for_process(self, folder: RunFolder) -> None:
        """Continue once the process runs; drop it where its node is gone, or where it cannot start."""
        assert self.part is not None
        is_there = self.part.node_id in {node.node_id for node in nodes()}
        done, _ = ray.wait([self._ready], timeout=0)
        if not done:
            if not is_there or time.monotonic() >= self._ready_by:
                self._drop()
            return
        try:
            ray.get(self._ready)
        except ActorUnavailableError:  # Ray starts it again.
            self._ready = self._actor.ready.remote()
            if not is_there or time.monotonic() >= self._ready_by:
                self._drop()
            return
        except Exception as error:  # It was lost again, or cannot read the data.
            self._drop()
            if is_there:
                self._count_start(reason_of(error))
            return
        self._ready, self._start_failures = None, 0
        if self._loss is not None:  # It runs again where it was lost: the evaluation may have ended it.
            (step, reason), self._loss = self._loss, None
            self._failed(folder, step, reason)

    def _count_start(self, reason: str) -> None:
        """Try again later, and no more after MAX_TRIES: `finish` tries once more, when the ranks have ended."""
        self._look_at = time.monotonic() + NODE_SECONDS
        self._start_failures += 1
        if self._start_failures >= MAX_TRIES:
            self._is_on = False
            self.report(
                f"the process that evaluates beside training cannot start: {reason}; evaluations wait for the end of training"
            )

    def finish(self, folder: RunFolder, give_up: Callable[[], bool]) -> bool:
        """Wait until no evaluation is outstanding; return False where `give_up()` returned true first.

        Raises StorageError where the storage does not answer, CannotEvaluate where the process cannot start, RankFailed
        where the cluster has no room for WAIT_SECONDS.
        """
        journal, since, look_at = self.journal(folder), time.monotonic(), 0.0
        self._start_failures = 0
        left = journal.outstanding()
        if left:
            self.report(f"{len(left)} evaluation(s) are outstanding, of steps {', '.join(map(str, left))}")
        while left or self._call is not None:
            if give_up():
                return False
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + NODE_SECONDS
                self._find_place(since, give_up)
            if not self.look(folder):
                left = journal.outstanding()
            time.sleep(FINISH_POLL_SECONDS)
        return True

    def _find_place(self, since: float, give_up: Callable[[], bool]) -> None:
        """Start the process again where its node is gone, now that no rank needs room. Raises RankFailed in time."""
        if self._is_on and self._ready is not None:  # `look` waits for it.
            problem: NotStarted | None = NotStarted("the process does not start again")
        else:
            problem = self.start((), None, give_up)
        if problem is None or give_up():
            return
        self._start_failures += problem.is_lasting
        if self._start_failures >= MAX_TRIES:
            raise CannotEvaluate(f"no evaluation could begin: {problem.reason}")
        if time.monotonic() - since >= WAIT_SECONDS:
            raise RankFailed(f"no evaluation could begin in {WAIT_SECONDS:.0f} s: {problem.reason}")

    def _take(self, folder: RunFolder, step: int, call: Any) -> None:
        """Record the result of a step, or that it failed for good; otherwise it is tried again. Raises StorageError."""
        try:
            evaluation = ray.get(call)
        except Exception as error:  # A lost process, or whatever the evaluation has raised.
            if isinstance(error, RayError) and not isinstance(error, RayTaskError):
                self._call, self._loss = None, (step, reason_of(error))
                self._await_process()
                return
            cause = getattr(error, "cause", None) or error
            # Another try would find the same, but for a storage that did not answer.
            is_final = isinstance(cause, ExplainedError) and not isinstance(cause, StorageError)
            self._failed(folder, step, reason_of(error), is_final=is_final)
            return
        self.journal(folder).write(step, evaluation)
        self._call = None
        for line in evaluation[2]:
            self.report(line)

    def _failed(self, folder: RunFolder, step: int, reason: str, *, is_final: bool = False) -> None:
        """Try again, or record that the step is not evaluated. Raises StorageError."""
        count = self._failures[step] + 1
        if not is_final and count < MAX_TRIES:
            self._failures[step], self._call = count, None
            self.report(
                f"the evaluation of step {step} failed ({reason}); it is tried again ({count + 1} of {MAX_TRIES})"
            )
            return
        self.journal(folder).write_problem(step, reason)
        self._call = None
        self.report(f"the checkpoint of step {step} is not evaluated: {reason}")


def reason_of(error: BaseException) -> str:
    """Return the cause of an error of Ray, in one line."""
    cause = getattr(error, "cause", None)
    shown = cause if isinstance(cause, BaseException) else error
    lines = str(shown).strip().splitlines() or [type(shown).__name__]
    if isinstance(shown, RayActorError) and shown.actor_init_failed:
        # A traceback, whose last line is `module.Class: message`.
        kind, _, message = lines[-1].strip().partition(": ")
        return message if message and kind.replace(".", "").isidentifier() else lines[-1].strip()
    return lines[0]


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
    if not give_up():
        beside.report(f"train.evaluate='beside': {problem.reason}: the ranks evaluate")
        catch_up(beside, folder, give_up)
    beside.close()
    return None


def catch_up(beside: BesideEvaluations, folder: RunFolder, give_up: Callable[[], bool]) -> None:
    """Evaluate and log what an earlier attempt has left, before ranks begin that evaluate themselves.

    Where that cannot begin, the steps are recorded as not evaluated: metrics come in the order of their steps.
    """
    journal = beside.journal(folder)
    try:
        is_done = beside.finish(folder, give_up)
    except CannotEvaluate as problem:
        is_done = True
        for step in journal.outstanding():
            journal.write_problem(step, str(problem))
            beside.report(f"the checkpoint of step {step} is not evaluated: {problem}")
    if is_done:
        journal.complete()
    beside.close()


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
    return replace(outcome, metrics={**outcome.metrics, **beside.journal(folder).complete()})
