"""The content of a log line: metrics of training and of the machines, gradient norms, and the samples that were bad.

Most of it is summed over the ranks. All ranks call these functions at the same step; rank 0 reports.
"""

from __future__ import annotations

import torch

from resnet_dist.config import Data, Recipe
from resnet_dist.order.samples import Order
from resnet_dist.train.state.train_state import TrainState
from resnet_dist.train.state.usage_metrics import usage_metrics
from resnet_dist.train.step.gradient_norms import GRADIENT_NORMS
from resnet_dist.train.step.profile import BatchSource, Step
from resnet_dist.train.tracker import Tracker
from resnet_dist.train.watch.guards import MAX_LISTED
from resnet_dist.world import World

BAD_EVALUATION_SAMPLE = "bad evaluation sample"  # opens the line that names one


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
