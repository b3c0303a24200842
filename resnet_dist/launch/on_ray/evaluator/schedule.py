"""The evaluations beside training: one checkpoint at a time, the oldest that awaits it, and again where one fails.

Results go to the run's storage, see launch/outstanding.py.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from resnet_dist.launch.on_ray.settings import set_defaults

set_defaults()

import ray
from ray.exceptions import RayError, RayTaskError

from resnet_dist.config import Recipe
from resnet_dist.errors import ExplainedError, RankFailed, StorageError
from resnet_dist.launch.on_ray.evaluator.process import CannotStart, EvaluatorProcess, NotStarted, reason_of
from resnet_dist.launch.on_ray.placement.fit import describe
from resnet_dist.launch.on_ray.placement.nodes import free_parts, nodes
from resnet_dist.launch.on_ray.placement.reserved import Reserved
from resnet_dist.launch.outstanding import Journal
from resnet_dist.runs.folder import RunFolder

MAX_TRIES = 3  # of the evaluation of one checkpoint, and of the start of the process
FINISH_POLL_SECONDS, NODE_SECONDS = 0.2, 5.0
WAIT_SECONDS = 600.0  # for a place, once the ranks have ended


class CannotEvaluate(RankFailed):
    """A process that cannot start, wherever it has room."""


class BesideEvaluations:
    """The evaluations beside one run, as its driver sees them. It never waits but in `start` and `finish`."""

    def __init__(self, recipe: Recipe, report: Callable[[str], None], *, gpu: bool) -> None:
        """Prepare to evaluate. gpu: the ranks have GPUs."""
        self.recipe, self.report = recipe, report
        self._process = EvaluatorProcess(recipe, gpu=gpu)
        self._call: tuple[int, Any] | None = None  # a step, and the result that is to come
        self._loss: tuple[int, str] | None = None  # a step whose process was lost, and why
        self._failures: Counter[int] = Counter()
        self._start_failures = 0
        self._is_on, self._look_at = False, -math.inf
        self._journal: Journal | None = None
        self._problem = ""  # of the storage, as it was reported

    @property
    def part(self) -> Reserved | None:
        """The part of a node that the process has; None while there is none."""
        return self._process.part

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
        alive, self._process.ranks = nodes(), (sizes, cpus)
        if self._process.may_stay(alive):
            return None
        self.close()
        if not self._process.place(alive):
            return NotStarted(f"no CPU is left beside the ranks ({describe(alive)})")
        problem = self._process.wait(give_up)
        if problem is None:
            self._is_on, self._start_failures = True, 0
        else:
            self.close()
        return problem

    def close(self) -> None:
        """End the process; an evaluation that is under way is dropped, and made again by the next one."""
        self._is_on = False
        self._process.drop()
        self._call = self._loss = None

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
        if self._process.part is None:
            alive, self._loss = nodes(), None
            if not self._process.place(alive, free_parts(alive)):
                self._look_at = time.monotonic() + NODE_SECONDS
        elif self._process.is_expected:
            self._look_for_process(folder)
        else:
            journal = self.journal(folder)
            if left := journal.outstanding():
                self._call = left[0], self._process.evaluate(journal.location_of(left[0]))

    def _look_for_process(self, folder: RunFolder) -> None:
        """Continue once the process runs."""
        try:
            if not self._process.runs_now():
                return
        except CannotStart as problem:
            self._count_start(str(problem))
            return
        self._start_failures = 0
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
        if self._is_on and self._process.is_expected:  # `look` waits for it.
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
                self._process.expect()
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
