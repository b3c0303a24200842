"""A share of an evaluation: neighbouring steps, each evaluated whole by one process.

A step has the same samples in the same forward passes whoever evaluates it, and the sums of the passes are added in
the order of the steps. So any number of workers of equal threads counts every sample once, and gets the same bits.

Shapes: P forward passes, V views of an image (its own, and its corruptions).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from resnet_dist.data.shards.index import read_index
from resnet_dist.evaluation.robust import Condition, views
from resnet_dist.train.checkpoint.load import TrainedModel
from resnet_dist.train.device import Precision, set_arithmetic
from resnet_dist.train.evaluate import evaluate_steps, evaluation_loader, unchanged
from resnet_dist.train.predictions import PredictionLog
from resnet_dist.world import World


@dataclass(frozen=True)
class EvaluationTask:
    """An evaluation, as plain values that can be sent to another machine."""

    trained: TrainedModel  # on the CPU
    shards: str
    precision: Precision
    conditions: tuple[Condition, ...] = ()  # beside the images as they are
    keeps_predictions: bool = False
    gpu: bool = False


@dataclass(frozen=True)
class Share:
    """The result of some steps."""

    sums_PV4: NDArray[np.float64]
    bad: tuple[str, ...]
    predictions: bytes | None


def evaluate_share(
    job: EvaluationTask,
    steps: range,
    cpus: int | None = None,
    show: Callable[[int], None] = lambda done: None,
) -> Share:
    """Evaluate some steps in this process. cpus: for decoding; show: gets the number of steps that are done."""
    world = replace(World.single(gpu=job.gpu), cpus=cpus)
    set_arithmetic(job.trained.recipe.train, world.device)
    model = job.trained.model.to(world.device)
    log = PredictionLog() if job.keeps_predictions and len(steps) else None
    num_begun = 0

    def before_batch() -> None:
        nonlocal num_begun
        show(num_begun)
        num_begun += 1

    index = read_index(job.shards)
    threads = cpus or torch.get_num_threads()
    with (
        evaluation_loader(index, job.trained.recipe.data, world) as loader,
        views(job.conditions, threads) as corrupted,
    ):
        sums, bad = evaluate_steps(
            model,
            loader,
            steps,
            world.device,
            before_batch=before_batch,
            predictions=log,
            precision=job.precision,
            views=(unchanged, *corrupted),
        )
        kept = None if log is None else log.gather(world).to_bytes()
    return Share(sums.cpu().numpy(), tuple(bad), kept)
