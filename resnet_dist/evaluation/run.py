"""Cut an evaluation into shares, and join what they return: the same result for every number of shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from resnet_dist.data.shards.index import Index
from resnet_dist.evaluation.job import EvaluationTask, Share, evaluate_share
from resnet_dist.evaluation.robust import Condition, robust_metrics
from resnet_dist.train.evaluate import evaluation_order, metrics_of, total_of
from resnet_dist.train.predictions import Predictions, joined

TOP1 = 1  # the place of the hits among the sums


@dataclass(frozen=True)
class Result:
    """The result of an evaluation. Metrics have the names of training's evaluations, without `eval/`."""

    metrics: dict[str, float]
    bad: list[str]  # samples that could not be decoded, with reasons
    top1: dict[Condition, float] = field(default_factory=dict)  # under corruptions
    predictions: Predictions | None = None


def cut(num_steps: int, num_shares: int) -> list[range]:
    """Cut the steps into neighbouring parts of about the same size, as many as there are shares, or as steps."""
    count = min(num_steps, num_shares)
    edges = [number * num_steps // count for number in range(count + 1)] if count else [0]
    return [range(low, high) for low, high in zip(edges, edges[1:], strict=False)]


def evaluate_here(
    job: EvaluationTask,
    index: Index,
    show: Callable[[int], None] = lambda done: None,
    report_bad: Callable[[list[str]], None] = lambda texts: None,
) -> Result:
    """Evaluate in this process. show: gets the number of steps that are done."""
    steps = range(evaluation_order(index, job.trained.recipe.data).steps_per_epoch)
    return join(job, index, [evaluate_share(job, steps, show=show)], report_bad)


def join(
    job: EvaluationTask,
    index: Index,
    shares: Sequence[Share],
    report_bad: Callable[[list[str]], None] = lambda texts: None,
) -> Result:
    """Return the result of all shares, given in the order of their steps. report_bad: gets the bad samples, with reasons.

    Raises TooManyBadSamples where all samples are bad, UserError where there are none.
    """
    bad = sorted(text for share in shares for text in share.bad)
    report_bad(bad)  # First: they are the cause where no result can be made.
    parts = [share.sums_PV4 for share in shares]
    table_PV4 = torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, 1, 4)
    sums_V4 = total_of(table_PV4).numpy()
    found = metrics_of(sums_V4[0].tolist(), bad, index)
    metrics = {name.removeprefix("eval/"): value for name, value in found.items()}
    top1 = {
        condition: float(sums[TOP1] / metrics["samples"])
        for condition, sums in zip(job.conditions, sums_V4[1:], strict=True)
    }
    if top1:
        metrics |= robust_metrics(top1)
    kept = [share.predictions for share in shares if share.predictions is not None]
    predictions = joined([Predictions.from_bytes(content) for content in kept]) if kept else None
    return Result(metrics, bad, top1, predictions)
