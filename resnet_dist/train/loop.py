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

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from resnet_dist.config import Data, ProfiledSteps, Recipe, check_world_size
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.shards.index import Index
from resnet_dist.errors import TooManyBadSamples, TrainingError, UserError
from resnet_dist.order.samples import Order
from resnet_dist.order.versions import NEWEST_VERSION
from resnet_dist.runs.folder import CHECKPOINTS_FOLDER
from resnet_dist.runs.page import PROFILE_FOLDER
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import ALWAYS, Permit, Storage
from resnet_dist.system.memory import collect_normally
from resnet_dist.train.beside import Beside, followed
from resnet_dist.train.checkpoint.evaluated import awaiting
from resnet_dist.train.checkpoint.writer import Checkpointer
from resnet_dist.train.device import prepare_device
from resnet_dist.train.evaluate import evaluate, evaluation_loader
from resnet_dist.train.plan import Plan, due, order_of
from resnet_dist.train.predictions import PredictionLog, too_many
from resnet_dist.train.start.indexes import indexes_of
from resnet_dist.train.start.initial import initial_state, initialize_weights
from resnet_dist.train.state.train_state import TrainState
from resnet_dist.train.state.usage_metrics import usage_metrics, usage_of
from resnet_dist.train.step.gradient_norms import GRADIENT_NORMS
from resnet_dist.train.step.profile import BatchSource, Step, StepProfile
from resnet_dist.train.step.train_step import TrainStep, compiled
from resnet_dist.train.tracker import Tracker
from resnet_dist.train.watch.control import Control, Stopped
from resnet_dist.train.watch.guards import MAX_LISTED, Guard, check_agreement
from resnet_dist.train.watch.progress import GATHERING, NEXT_BATCH, Progress
from resnet_dist.train.watch.stragglers import Stragglers
from resnet_dist.world import World

BAD_EVALUATION_SAMPLE = "bad evaluation sample"  # opens the line that names one


@dataclass(frozen=True)
class Outcome:
    """The end of an attempt: it stopped at `step` of `total_steps`, with the newest value of every metric."""

    step: int
    total_steps: int
    metrics: dict[str, float]
    finished: bool


@dataclass(frozen=True)
class Parts:
    """The parts that the loop of one attempt works with."""

    order: Order
    plan: Plan
    state: TrainState
    guard: Guard
    loader: BatchSource
    eval_loader: Loader
    checkpoints: Checkpointer
    control: Control
    train_step: Step
    stragglers: Stragglers
    predictor: nn.Module  # the model to evaluate, or its average; compiled where the recipe asks for it


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
    options = (stop_requested, progress, order_version, permit, logged)
    attempt = set_up(recipe, location, world, tracker, *options)
    with profiled(attempt, profile, location, world, tracker, permit) as parts:
        state, plan, guard = parts.state, parts.plan, parts.guard
        while not (state.finished(plan.total) or parts.control.stop):
            if not state.evaluation_pending:
                progress.at(NEXT_BATCH, state.step)
                parts.train_step(parts.loader.batch_at(state.step))
                state.step += 1
                state.evaluation_pending = due(state.step, plan.eval, plan.total)
                if due(state.step, plan.log, plan.total):
                    progress.at(GATHERING, state.step)
                    since_last = training_metrics(state, parts.order, world)
                    since_last |= decoding_metrics(parts.loader, recipe.data, world)
                    tracker.log(since_last | usage_of_machines(state, recipe, world), state.step)
                    parts.stragglers.look(state.meter.times_RT)
                    log_gradient_norms(parts.train_step, tracker, state.step)
                    guard.check_samples(state, report_bad_samples(state, tracker, world))
                    guard.check_losses(state)
            # Another process evaluates the checkpoint of this step.
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
                guard.check_losses(state)
                parts.checkpoints.save(state, awaits_evaluation=awaits)
                parts.control.saved()
        progress.at("writing the last checkpoint", state.step)
        parts.checkpoints.wait()
    return Outcome(state.step, plan.total, state.metrics, state.finished(plan.total))


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


@contextmanager
def set_up(
    recipe: Recipe,
    location: Path | str,
    world: World,
    tracker: Tracker,
    stop_requested: Callable[[], bool],
    progress: Progress,
    order_version: int,
    permit: Permit,
    logged: Collection[int] | None,
) -> Iterator[Parts]:
    """Yield the parts of an attempt, with the state of the newest good checkpoint or of a new run; close them after.

    It checks and compares the ranks before it builds the model and loads data, so that a mistake ends the attempt soon.
    Raises UserError for what the recipe, the data or the device do not allow, TrainingError where ranks differ.
    """
    run = open_storage(location)
    train_index, eval_index = indexes_of(recipe.data, run)
    check_world_size(recipe.data, world.world_size)
    prepare_device(recipe.train, world, recipe.data)
    hosts = check_agreement(recipe, (train_index, eval_index), world, report=tracker.note)
    order = order_of(recipe, train_index, order_version)
    plan = Plan.of(recipe, order)
    guard = Guard(recipe, train_index, order, world.world_size)
    state = initial_state(recipe, len(train_index.classes), world)
    storage, logged = run.at(CHECKPOINTS_FOLDER), logged if world.is_main else None
    with (
        followed(run, tracker, recipe.train.best_metric, logged) as beside,
        Loader(
            train_index, order, recipe.data, world, seed=recipe.seed, sizes=plan.sizes, total_steps=plan.total
        ) as loader,
        evaluation_loader(eval_index, recipe.data, world) as eval_loader,
        checkpointer(storage, recipe, train_index.classes, world, tracker, permit, beside) as checkpoints,
        Control(
            world, recipe.train.stall_timeout_seconds, stop_requested, checkpoints.due_by_time
        ) as control,
        closing(usage_of(world)) as state.meter.usage,
    ):
        restore_or_initialize(state, checkpoints, recipe, train_index, world, tracker, plan.total)
        if beside is not None:
            beside.start(state.best, awaiting(storage, beside.evaluated()))
        guard.check_length(state, plan.total)
        train_step = TrainStep(state, recipe, plan, world, progress)
        predictor = compiled(state.predictor, recipe.train)
        collect_normally()
        state.meter.restart_clock()
        yield Parts(
            order=order,
            plan=plan,
            state=state,
            guard=guard,
            loader=loader,
            eval_loader=eval_loader,
            checkpoints=checkpoints,
            control=control,
            train_step=train_step,
            stragglers=Stragglers(hosts, tracker.note),
            predictor=predictor,
        )


def checkpointer(
    storage: Storage,
    recipe: Recipe,
    classes: tuple[str, ...],
    world: World,
    tracker: Tracker,
    permit: Permit,
    beside: Beside | None,
) -> Checkpointer:
    """Return the checkpoints of a run, which are reported to its tracker."""
    reports = (tracker.note, tracker.flush, permit, tracker.log_checkpoint)
    return Checkpointer(storage, recipe, classes, world, *reports, beside)


def restore_or_initialize(
    state: TrainState,
    checkpoints: Checkpointer,
    recipe: Recipe,
    train_index: Index,
    world: World,
    tracker: Tracker,
    total_steps: int,
) -> None:
    """Load the newest good checkpoint on all ranks, or give the weights of a new run their first values."""
    if checkpoints.restore(state):
        tracker.note(f"resumed at step {state.step} of {total_steps}")
    else:
        initialize_weights(state, recipe, train_index, world, tracker.note)


@contextmanager
def profiled(
    attempt: AbstractContextManager[Parts],
    steps: ProfiledSteps | None,
    location: Path | str,
    world: World,
    tracker: Tracker,
    permit: Permit,
) -> Iterator[Parts]:
    """Yield the parts of an attempt, on rank 0 with a loader and a step that write a trace of `steps`, if there are any."""

    def write(name: str, content: bytes) -> None:
        permit.check()
        open_storage(location).at(PROFILE_FOLDER).write(name, content)

    with attempt as parts:
        if steps is None or not world.is_main:
            yield parts
            return
        loader, train_step = parts.loader, parts.train_step
        with StepProfile(steps, loader, train_step, world.device, write, tracker.note) as profile:
            yield replace(parts, loader=profile, train_step=profile)


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

    predictions = PredictionLog() if wants_figures(parts, recipe, tracker) else None
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


def wants_figures(parts: Parts, recipe: Recipe, tracker: Tracker) -> bool:
    """Report whether figures of the evaluation that begins are asked for; all ranks decide the same."""
    is_asked = recipe.train.figures == "evaluations" or parts.state.step >= parts.plan.total
    if recipe.train.figures == "none" or not is_asked:
        return False
    if (line := too_many(parts.eval_loader.index.num_samples)) is not None:
        tracker.note(line)
    return line is None


def training_metrics(state: TrainState, order: Order, world: World) -> dict[str, float]:
    """Return the training metrics over all ranks since the last log line. A collective."""
    metrics = state.meter.flush(world)
    state.bad_samples += round(metrics["data/bad_samples"])
    metrics |= {
        "data/bad_samples": float(state.bad_samples),
        "train/lr": state.metrics["train/lr"],
        "train/epoch": state.step / order.steps_per_epoch,
    }
    state.metrics |= metrics
    return metrics


def decoding_metrics(loader: BatchSource, data: Data, world: World) -> dict[str, float]:
    """Return the images so far, over all ranks, that the GPU could not decode. A collective with `data.decode="gpu"`."""
    if data.decode == "cpu":
        return {}
    count = world.sum(torch.tensor(float(loader.num_decoded_on_cpu), device=world.device))
    return {"data/decoded_on_cpu": float(count)}


def usage_of_machines(state: TrainState, recipe: Recipe, world: World) -> dict[str, float]:
    """Return on rank 0 the metrics of the machines since the last log line; none where it has no new sample."""
    usage = state.meter.usage
    if not usage.is_new:
        return {}
    usage.restart()
    if not world.is_main:
        return {}
    return usage_metrics(state.meter.usage_RV, per_node=recipe.train.log_node_metrics)


def log_gradient_norms(train_step: Step, tracker: Tracker, step: int) -> None:
    """Log the norm of every layer's gradient where the recipe asks for it."""
    if train_step.gradient_norms is not None:
        tracker.log_layers(GRADIENT_NORMS, train_step.gradient_norms.read(), step)


def report_bad_samples(state: TrainState, tracker: Tracker, world: World) -> list[str]:
    """Report the samples that were bad since the last log line, and return their names, each with its reason."""
    # Every rank has this count, so all or none enter the collective below.
    if state.meter.bad_at_last_flush == 0:
        return []
    texts = state.meter.take_bad(world)
    note_bad(texts, "bad sample", tracker)
    return texts


def note_bad(texts: list[str], kind: str, tracker: Tracker) -> None:
    for line in bad_lines(texts, kind):
        tracker.note(line)


def bad_lines(texts: list[str], kind: str) -> list[str]:
    """Return the lines that name bad samples, MAX_LISTED at most. texts: names with reasons."""
    more = len(texts) - MAX_LISTED
    return [f"{kind} {text}" for text in texts[:MAX_LISTED]] + (
        [f"and {more} more {kind}s"] if more > 0 else []
    )
