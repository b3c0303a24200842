"""The parts that the loop of one attempt works with: made in one place, and closed when the attempt ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from resnet_dist.config import ProfiledSteps, Recipe, check_world_size
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.shards.index import Index
from resnet_dist.order.samples import Order
from resnet_dist.runs.folder import CHECKPOINTS_FOLDER
from resnet_dist.runs.page import PROFILE_FOLDER
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Permit, Storage
from resnet_dist.system.memory import collect_normally
from resnet_dist.train.checkpoint.awaiting import awaiting
from resnet_dist.train.checkpoint.follow_results import ResultsFollower, following
from resnet_dist.train.checkpoint.writer import Checkpointer
from resnet_dist.train.device import prepare_device
from resnet_dist.train.evaluate import evaluation_loader
from resnet_dist.train.plan import Plan, order_of
from resnet_dist.train.start.indexes import indexes_of
from resnet_dist.train.start.initial import initial_state, initialize_weights
from resnet_dist.train.state.train_state import TrainState
from resnet_dist.train.state.usage_metrics import usage_of
from resnet_dist.train.step.profile import BatchSource, Step, StepProfile
from resnet_dist.train.step.train_step import TrainStep, compiled
from resnet_dist.train.tracker import Tracker
from resnet_dist.train.watch.control import Control
from resnet_dist.train.watch.guards import Guard, check_agreement
from resnet_dist.train.watch.progress import Progress
from resnet_dist.train.watch.stragglers import Stragglers
from resnet_dist.world import World


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
        following(run, tracker, recipe.train.best_metric, logged) as results,
        Loader(
            train_index, order, recipe.data, world, seed=recipe.seed, sizes=plan.sizes, total_steps=plan.total
        ) as loader,
        evaluation_loader(eval_index, recipe.data, world) as eval_loader,
        checkpointer(storage, recipe, train_index.classes, world, tracker, permit, results) as checkpoints,
        Control(
            world, recipe.train.stall_timeout_seconds, stop_requested, checkpoints.due_by_time
        ) as control,
        closing(usage_of(world)) as state.meter.usage,
    ):
        restore_or_initialize(state, checkpoints, recipe, train_index, world, tracker, plan.total)
        if results is not None:
            results.start(state.best, awaiting(storage, results.evaluated()))
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
    results: ResultsFollower | None,
) -> Checkpointer:
    """Return the checkpoints of a run, which are reported to its tracker."""
    reports = (tracker.note, tracker.flush, permit, tracker.log_checkpoint)
    return Checkpointer(storage, recipe, classes, world, *reports, results)


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
