"""The process that evaluates: an actor with a part of a node to itself, started before the ranks, which leave it free."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from resnet_dist.launch.on_ray.settings import set_defaults

set_defaults()

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from resnet_dist.config import Recipe
from resnet_dist.launch.on_ray.placement.fit import Node, Placement
from resnet_dist.launch.on_ray.placement.held import free_and_held
from resnet_dist.launch.on_ray.placement.nodes import nodes
from resnet_dist.launch.on_ray.placement.reserved import Reserved, keeps_number, room_beside
from resnet_dist.launch.outstanding import Evaluation

START_SECONDS = 60.0  # for the actor to have its place
START_POLL_SECONDS = 0.2


class Evaluator:
    """The actor: it imports torch once, and keeps the loader of the evaluation set between calls."""

    def __init__(self, recipe_json: str, cpus: int, *, gpu: bool) -> None:
        # Here, since it imports torch.
        from resnet_dist.launch.checkpoint_evaluator import CheckpointEvaluator

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


class CannotStart(Exception):
    """A process that has ended in its start, for the reason that is named."""


class EvaluatorProcess:
    """The actor as its driver sees it: without a place, expected to run, or running. Only `wait` waits."""

    def __init__(self, recipe: Recipe, *, gpu: bool) -> None:
        """Prepare to start it. gpu: the ranks have GPUs."""
        self.part: Reserved | None = None  # of a node, which it has; None where it has no place
        self._recipe, self._gpu = recipe, gpu
        self._actor: Any = None
        self._ready: Any = None  # the answer of an actor that is not known to run; None where it runs
        self._ready_by = math.inf
        # Beside ranks in one of these numbers, with so many CPUs, as of `choose_placement`; no numbers: no ranks.
        self.ranks: tuple[Sequence[int], int | None] = ((), None)

    @property
    def is_expected(self) -> bool:
        """Report whether it has a place and is not known to run."""
        return self._ready is not None

    def may_stay(self, alive: Sequence[Node]) -> bool:
        """Report whether it runs where the ranks leave it room."""
        if self.part is None or self._ready is not None:
            return False
        is_there = self.part.node_id in {node.node_id for node in alive}
        return is_there and keeps_number(self.part, alive, *self.ranks, gpu=self._gpu)

    def place(self, alive: Sequence[Node], free: Sequence[Node] | None = None) -> bool:
        """Begin to start it beside the ranks; return False where there is no room. free: as of `room_beside`."""
        part = room_beside(alive, *self.ranks, gpu=self._gpu, free=free)
        if part is None:
            return False
        # On that node alone: elsewhere it would take the place of a rank.
        place = NodeAffinitySchedulingStrategy(part.node_id, soft=False)
        options = {"num_cpus": part.cpus, "num_gpus": part.gpus, "max_restarts": -1}
        made = ray.remote(Evaluator).options(**options, scheduling_strategy=place)
        self._actor = made.remote(self._recipe.to_json(), part.cpus, gpu=part.gpus > 0)
        self.part = part
        self.expect()
        return True

    def expect(self) -> None:
        """Expect it to run in START_SECONDS: it was placed, or was lost, and Ray starts it again."""
        self._ready, self._ready_by = self._actor.ready.remote(), time.monotonic() + START_SECONDS

    def wait(self, give_up: Callable[[], bool]) -> NotStarted | None:
        """Wait until it runs; return why it does not."""
        assert self.part is not None
        while time.monotonic() < self._ready_by:
            if give_up():
                return NotStarted("interrupted")
            done, _ = ray.wait([self._ready], timeout=START_POLL_SECONDS)
            if not done:
                continue
            try:
                ray.get(self._ready)
                self._ready = None
                return None
            except Exception as error:  # The process was lost, or cannot read the data.
                return NotStarted(f"it cannot start: {reason_of(error)}", is_lasting=True)
        needs = Placement(1, self.part.cpus, self.part.gpus > 0)
        return NotStarted(
            f"it needs {needs} on one node, and has not started in {START_SECONDS:.0f} s; {free_and_held()}"
        )

    def runs_now(self) -> bool:
        """Report whether it runs; it is dropped where its node is gone, or where it has not started in time.

        Raises CannotStart where it was lost again, or cannot read the data, though its node is there.
        """
        assert self.part is not None
        is_there = self.part.node_id in {node.node_id for node in nodes()}
        done, _ = ray.wait([self._ready], timeout=0)
        try:
            if done:
                ray.get(self._ready)
                self._ready = None
                return True
        except ActorUnavailableError:  # Ray starts it again.
            self._ready = self._actor.ready.remote()
        except Exception as error:
            self.drop()
            if is_there:
                raise CannotStart(reason_of(error)) from None
            return False
        if not is_there or time.monotonic() >= self._ready_by:
            self.drop()
        return False

    def evaluate(self, location: str) -> Any:
        """Begin the evaluation of a checkpoint; return the call, whose result is to come."""
        return self._actor.evaluate.remote(location)

    def drop(self) -> None:
        """End it; another one may follow."""
        if self._actor is not None:
            ray.kill(self._actor)
        self._actor = self._ready = self.part = None


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
