"""The evaluations beside training before the ranks of an attempt start, and after they have ended.

Metrics come in the order of their steps: what an earlier attempt has left is evaluated before ranks that evaluate themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from resnet_dist.launch.on_ray.evaluator.schedule import BesideEvaluations, CannotEvaluate
from resnet_dist.launch.on_ray.placement.placer import Placer
from resnet_dist.runs.folder import RunFolder
from resnet_dist.train.loop import Outcome


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
