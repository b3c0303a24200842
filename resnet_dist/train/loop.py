"""The loop: distributed training on one screen. Start reading at `train`.

It is the same under Ray Train, torchrun and in one process: they differ in who made the World. It knows no
Ray and no MLflow: metrics go to a Tracker, and what happens to them is not its business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from resnet_dist.config import Recipe, check_world_size
from resnet_dist.data.index import Index, read_index
from resnet_dist.data.loader import Loader
from resnet_dist.data.order import Order
from resnet_dist.evaluate import evaluate, evaluation_loader
from resnet_dist.model import build_model
from resnet_dist.train.checkpoint import Checkpoints
from resnet_dist.train.gradients import GRADIENT_NORMS
from resnet_dist.train.meter import Meter, TrainingError
from resnet_dist.train.optim import build_optimizer
from resnet_dist.train.plan import Plan, due, plan_of
from resnet_dist.train.state import TrainState
from resnet_dist.train.step import TrainStep
from resnet_dist.world import World

MOST_LISTED = 20  # bad samples named at one log line


class Tracker(Protocol):
    """Where rank 0 reports to. Never raises into training, never makes it wait."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def log_layers(self, name: str, values: dict[str, float], step: int) -> None: ...

    def note(self, text: str) -> None: ...


class NullTracker:
    """The Tracker of every other rank."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        pass

    def log_layers(self, name: str, values: dict[str, float], step: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: at `step` of `total_steps`, with the newest value of every metric."""

    step: int
    total_steps: int
    metrics: dict[str, float]

    @property
    def finished(self) -> bool:
        return self.step == self.total_steps


def train(
    recipe: Recipe,
    folder: Path,
    world: World,
    tracker: Tracker,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train to the end of `recipe`, from the newest good checkpoint in `folder`, or until asked to stop.

    Raises TrainingError where training cannot go on, with the last checkpoint kept.
    """
    train_index, eval_index = read_index(recipe.data.train), read_index(recipe.data.eval)
    check_world_size(recipe.data, world.world_size)
    check_agreement(recipe, (train_index, eval_index), folder, world)
    order, plan = plan_of(recipe, train_index)
    state = initial_state(recipe, len(train_index.classes), world)
    checkpoints = Checkpoints(folder / "checkpoints", recipe, train_index.classes, world)
    if checkpoints.restore_newest(state, report=tracker.note):
        tracker.note(f"resumed at step {state.step} of {plan.total}")
    train_step = TrainStep(state, recipe, plan, world)

    with (
        Loader(train_index, order, recipe.data, world, seed=recipe.seed) as loader,
        evaluation_loader(eval_index, recipe.data, world) as eval_loader,
    ):
        state.meter.restart_clock()
        while state.step < plan.total:
            batch = loader.batch_at(state.step)
            train_step(batch)
            state.step += 1
            if due(state.step, plan.log, plan.total):
                tracker.log(training_metrics(state, order, world), state.step)
                if train_step.gradient_norms is not None:
                    tracker.log_layers(GRADIENT_NORMS, train_step.gradient_norms.read(), state.step)
                check_health(state, recipe, list_bad_samples(state, tracker, world))
            if due(state.step, plan.eval, plan.total):
                state.metrics |= evaluate(state.model, eval_loader, world)
                tracker.log(only("eval/", state.metrics), state.step)
                state.meter.restart_clock()
            stop = any_rank(stop_requested(), state.step, plan, world)
            if stop or due(state.step, plan.checkpoint, plan.total):
                checkpoints.save(state)
            if stop:
                break
        checkpoints.wait()
    return Outcome(state.step, plan.total, state.metrics)


def initial_state(recipe: Recipe, num_classes: int, world: World) -> TrainState:
    """Step zero: the same weights on every rank, from the recipe's seed."""
    model = build_model(
        recipe.model.name,
        in_channels=recipe.data.channels,
        num_classes=num_classes,
        shortcut=recipe.model.shortcut,
        seed=recipe.seed,
    )
    model = model.to(world.device).to(memory_format=torch.channels_last)
    return TrainState(model, build_optimizer(model, recipe.optim), Meter(world.device))


def any_rank(flag: bool, step: int, plan: Plan, world: World) -> bool:
    """Whether any rank raised its flag, known to all at the same step."""
    if world.world_size == 1:
        return flag
    # Reading a tensor makes a GPU finish its queue: only where a log line has done so already.
    if world.device.type == "cuda" and not due(step, plan.log, plan.total):
        return False
    return bool(world.sum(torch.tensor(float(flag), device=world.device)).item())


def training_metrics(state: TrainState, order: Order, world: World) -> dict[str, float]:
    metrics = state.meter.flush(world)
    state.bad_samples += round(metrics["data/bad_samples"])
    metrics |= {
        "data/bad_samples": float(state.bad_samples),
        "train/lr": state.metrics["train/lr"],
        "train/epoch": state.step / order.steps_per_epoch,
    }
    state.metrics |= metrics
    return metrics


def list_bad_samples(state: TrainState, tracker: Tracker, world: World) -> list[str]:
    """Name the samples that were bad since the last log line, with the reason of each."""
    if state.meter.bad_at_last_flush == 0:  # known to all ranks: the rest is a collective
        return []
    texts = state.meter.take_bad(world)
    for text in texts[:MOST_LISTED]:
        tracker.note(f"bad sample {text}")
    if len(texts) > MOST_LISTED:
        tracker.note(f"and {len(texts) - MOST_LISTED} more bad samples")
    return texts


def check_health(state: TrainState, recipe: Recipe, bad: list[str]) -> None:
    """All ranks hold the same sums, so all stop together. Raises TrainingError."""
    fraction = state.bad_samples / (state.step * recipe.data.global_batch_size)
    if fraction > recipe.data.max_bad_fraction:
        raise TrainingError(
            f"{state.bad_samples} samples ({fraction:.2%}) could not be decoded by step {state.step}, more "
            f"than data.max_bad_fraction={recipe.data.max_bad_fraction} allows"
            + (f"; the first is {bad[0]}" if bad else "")
        )
    loss = state.metrics["train/loss"]
    if not math.isfinite(loss):
        raise TrainingError(
            f"the training loss is {loss} at step {state.step}: lower optim.lr={recipe.optim.lr} or give a "
            f"longer schedule.warmup={recipe.schedule.warmup!r}; the last checkpoint is kept"
        )


def check_agreement(recipe: Recipe, indexes: tuple[Index, Index], folder: Path, world: World) -> None:
    """Ranks that see another recipe, data set or run folder would train nonsense: compare before the start."""
    run_file = folder / "run.json"
    mine = {
        "recipe": recipe.digest(),
        "training index": indexes[0].digest(),
        "evaluation index": indexes[1].digest(),
        f"storage ({folder} is not shared)": run_file.read_text() if run_file.exists() else "absent",
    }
    for rank, theirs in enumerate(world.gather(mine)):
        different = [name for name in mine if mine[name] != theirs.get(name)]
        if different:
            raise TrainingError(f"ranks {world.rank} and {rank} differ in their {', '.join(different)}")


def only(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith(prefix)}
