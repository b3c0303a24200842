"""The training loop: distributed training on one screen. Start reading at `train`.

Every rank runs this code on its share of the data, and all ranks hold the same weights after every step.
Four calls of `train` make it so:

    loader.batch_at(step)      return this rank's share of the global batch of a step, computed from the step alone
    train_step(batch)          run forward and backward, average the gradients over the ranks, update the weights
    control.agree()            decide with all ranks whether to stop or to save
    checkpoints.save(state)    save on rank 0; a restart loads the same state on every rank

One rule holds throughout: a branch that leads to a collective (gradients, metrics, an evaluation) depends only on
what all ranks know. A rank that took another branch would leave the others waiting forever.

The loop is the same under Ray Train, under torchrun and in one process: they differ only in who makes the World.
It imports neither Ray nor MLflow; metrics go to a Tracker, which on rank 0 writes them for the driver to publish.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.config import ProfiledSteps, Recipe
from resnet_dist.errors import TooManyBadSamples, TrainingError, UserError
from resnet_dist.order.versions import NEWEST_VERSION
from resnet_dist.runs.storage.protocol import ALWAYS, Permit
from resnet_dist.train.evaluate import evaluate
from resnet_dist.train.log_lines import (
    BAD_EVALUATION_SAMPLE,
    decoding_metrics,
    log_gradient_norms,
    note_bad,
    report_bad_samples,
    training_metrics,
    usage_of_machines,
)
from resnet_dist.train.parts import Parts, profiled, set_up
from resnet_dist.train.plan import due
from resnet_dist.train.predictions import log_for_figures
from resnet_dist.train.tracker import Tracker
from resnet_dist.train.watch.control import Stopped
from resnet_dist.train.watch.progress import GATHERING, NEXT_BATCH, Progress
from resnet_dist.world import World


@dataclass(frozen=True)
class Outcome:
    """The end of an attempt: it stopped at `step` of `total_steps`, with the newest value of every metric."""

    step: int
    total_steps: int
    metrics: dict[str, float]
    finished: bool


def train(
    recipe: Recipe,
    location: Path | str,
    world: World,
    tracker: Tracker,
    stop_requested: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
    order_version: int = NEWEST_VERSION,
    permit: Permit = ALWAYS,
    profile: ProfiledSteps | None = None,
    logged: Collection[int] | None = None,
) -> Outcome:
    """Train to the end of `recipe`, or until `stop_requested` returns True on any rank; all ranks call it.

    It resumes from the newest good checkpoint of the run at `location`, a folder or a URL, which must have been trained
    with the same `order_version`. `permit` is asked before a checkpoint is written. A run that stopped before or during
    an evaluation resumes with that evaluation. profile: the steps whose trace is written beside the run. logged: not None
    where another process evaluates the checkpoints that are due; on rank 0, the steps of such evaluations that the
    tracker has.

    Raises TrainingError where training cannot continue; the last checkpoint is kept.
    """
    progress = progress or Progress()
    attempt = set_up(
        recipe, location, world, tracker, stop_requested, progress, order_version, permit, logged
    )
    with profiled(attempt, profile, location, world, tracker, permit) as parts:
        state, plan = parts.state, parts.plan
        while not (state.finished(plan.total) or parts.control.stop):
            if not state.evaluation_pending:
                progress.at(NEXT_BATCH, state.step)
                parts.train_step(parts.loader.batch_at(state.step))
                state.step += 1
                state.evaluation_pending = due(state.step, plan.eval, plan.total)
                if due(state.step, plan.log, plan.total):
                    log_step(parts, recipe, progress, world, tracker)
            # Do not evaluate here what another process evaluates: the checkpoint that is saved below.
            awaits = logged is not None and state.evaluation_pending
            if awaits:
                state.evaluation_pending = False
            elif state.evaluation_pending:
                evaluate_step(parts, recipe, progress, world, tracker)
            # Agree first: a rank that stopped or saved alone would leave the others waiting in the next collective.
            parts.control.agree()
            if awaits or parts.checkpoints.should_save(state, plan, parts.control):
                progress.at("saving", state.step)
                state.meter.gather(world)
                # Check first: no state may be saved after a loss that was not finite.
                parts.guard.check_losses(state)
                parts.checkpoints.save(state, awaits_evaluation=awaits)
                parts.control.saved()
        progress.at("writing the last checkpoint", state.step)
        parts.checkpoints.wait()
    return Outcome(state.step, plan.total, state.metrics, state.finished(plan.total))


def log_step(parts: Parts, recipe: Recipe, progress: Progress, world: World, tracker: Tracker) -> None:
    """Log what all ranks have measured since the last log line, and stop a run that cannot succeed."""
    state, guard = parts.state, parts.guard
    progress.at(GATHERING, state.step)
    since_last = training_metrics(state, parts.order, world)
    since_last |= decoding_metrics(parts.loader, recipe.data, world)
    tracker.log(since_last | usage_of_machines(state, recipe, world), state.step)
    parts.stragglers.look(state.meter.times_RT)
    log_gradient_norms(parts.train_step, tracker, state.step)
    guard.check_samples(state, report_bad_samples(state, tracker, world))
    guard.check_losses(state)


def evaluate_step(parts: Parts, recipe: Recipe, progress: Progress, world: World, tracker: Tracker) -> None:
    """Evaluate the model of this step on all ranks, unless they agree to stop before the end of the set."""
    state, guard = parts.state, parts.guard
    progress.at(GATHERING, state.step)
    state.meter.gather(world)
    # Check first: this names the bad micro-batch; an evaluation of NaN weights cannot.
    guard.check_losses(state)
    if metrics := evaluate_unless_stopped(parts, recipe, progress, world, tracker):
        tracker.log(metrics, state.step)
        guard.check_evaluation(metrics, state.step)
        state.evaluated(metrics, recipe.train.best_metric)
    state.meter.restart_clock()
    parts.stragglers.restart()


def evaluate_unless_stopped(
    parts: Parts, recipe: Recipe, progress: Progress, world: World, tracker: Tracker
) -> dict[str, float] | None:
    """Return the metrics of the evaluation set, or None where the ranks agreed to stop before its end.

    The predictions for all samples are recorded where figures of this evaluation are asked for.
    """

    def before_batch() -> None:
        progress.at("evaluating")
        parts.control.agree()
        if parts.control.stop:
            raise Stopped

    def report_bad(texts: list[str]) -> None:
        note_bad(texts, BAD_EVALUATION_SAMPLE, tracker)

    is_last = parts.state.step >= parts.plan.total
    num_samples = parts.eval_loader.index.num_samples
    predictions = log_for_figures(recipe.train, num_samples, tracker.note, is_last=is_last)
    try:
        metrics = evaluate(
            parts.predictor,
            parts.eval_loader,
            world,
            before_batch,
            report_bad,
            predictions,
            recipe.train.precision,
        )
        if predictions is not None:
            progress.at(GATHERING)
            tracker.log_predictions(predictions.gather(world), parts.state.step)
        return metrics
    except Stopped:
        return None
    except (TooManyBadSamples, UserError) as error:
        raise TrainingError(str(error)) from None
