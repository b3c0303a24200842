"""Evaluate a model: every sample counted once, on any number of ranks.

Shapes: B samples of a forward pass, S image size, C channels; P forward passes, V views of each image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_dist.config import Data
from resnet_dist.data.batches.loader import Batch, Loader
from resnet_dist.data.images.augment import normalize
from resnet_dist.data.shards.index import Index
from resnet_dist.errors import TooManyBadSamples, UserError
from resnet_dist.model import averaged_logits
from resnet_dist.order.samples import Order
from resnet_dist.train.device import Precision, autocast
from resnet_dist.train.predictions import TOP, PredictionLog
from resnet_dist.world import World

# uint8 (B, S, S, C) and the ids of the samples → the images that the model sees, of the same shape and device.
View = Callable[[Tensor, NDArray[np.int64]], Tensor]


def evaluation_order(index: Index, data: Data) -> Order:
    """Return the order of an evaluation: every sample once, unshuffled, the last step filled up with padding."""
    return Order(index.counts, data.global_batch_size, data.lanes, data.window, seed=0, training=False)


def evaluation_loader(index: Index, data: Data, world: World) -> Loader:
    """Return the loader for `evaluate`. It keeps its threads, and its cache if the recipe has one, between calls."""
    return Loader(index, evaluation_order(index, data), data, world, seed=0)


def unchanged(images_BSSC: Tensor, ids_B: NDArray[np.int64]) -> Tensor:
    """Return the images as they are: the view of an evaluation."""
    return images_BSSC


def evaluate(
    model: nn.Module,
    loader: Loader,
    world: World,
    before_batch: Callable[[], None] = lambda: None,
    report_bad: Callable[[list[str]], None] = lambda texts: None,
    predictions: PredictionLog | None = None,
    precision: Precision = "fp32",
) -> dict[str, float]:
    """Return the metrics over the loader's index; all ranks call it and get the same.

    They are eval/loss, eval/top1, eval/top5 (with more than five classes), eval/samples and eval/bad_samples.
    Sums are reduced over the ranks and divided once; padding and bad samples have weight 0. A forward pass has as
    many samples as in training, and its arithmetic.

    `before_batch` may raise to end the evaluation, but on all ranks at the same batch. `report_bad` receives the
    names of all ranks' bad samples, with the reasons, where there are any. `predictions` receives those for each sample.

    Raises TooManyBadSamples where all samples are bad, UserError where there are none.
    """
    steps = range(loader.order.steps_per_epoch)
    table_PV4, bad = evaluate_steps(
        model,
        loader,
        steps,
        world.device,
        before_batch=before_batch,
        predictions=predictions,
        precision=precision,
    )
    sums = total_of(table_PV4[:, 0])
    *sums_4, num_bad = world.sum(torch.cat([sums, sums.new_tensor([len(bad)])])).tolist()
    # Every rank has this sum, so all or none enter the collective below.
    if num_bad:
        bad = sorted(text for texts in world.gather(bad) for text in texts)
        report_bad(bad)
    return metrics_of(sums_4, bad, loader.index)


def evaluate_steps(
    model: nn.Module,
    loader: Loader,
    steps: Iterable[int],
    device: torch.device,
    *,
    before_batch: Callable[[], None] = lambda: None,
    predictions: PredictionLog | None = None,
    precision: Precision = "fp32",
    views: Sequence[View] = (unchanged,),
) -> tuple[Tensor, list[str]]:
    """Return the sums of every forward pass over this rank's part of some steps, (P, V, 4), and the bad samples.

    views: the model sees each image in each of these; `predictions` receives those for the first. Nothing waits for
    the device.
    """
    rows_P: list[Tensor] = []
    bad: list[str] = []
    was_training = model.training
    model.eval()
    try:
        for step in steps:
            before_batch()
            # Load outside inference_mode: the loader's threads could not write to tensors made inside it.
            batch = loader.batch_at(step)
            bad += batch.bad
            with torch.inference_mode(), autocast(precision, device):
                rows_P += evaluate_batch(model, batch, loader.data, views, predictions)
    finally:
        model.train(was_training)
    empty = torch.zeros(0, len(views), 4, dtype=torch.float64, device=device)
    return torch.stack(rows_P) if rows_P else empty, bad


def evaluate_batch(
    model: nn.Module, batch: Batch, data: Data, views: Sequence[View], predictions: PredictionLog | None
) -> list[Tensor]:
    """Return the sums of every forward pass over a batch of this rank, each (V, 4)."""
    size = data.micro_batch_size or len(batch.ids_B)
    rows_P: list[Tensor] = []
    for rows in (slice(first, first + size) for first in range(0, len(batch.ids_B), size)):
        targets, sums_V = (batch.labels_B[rows], batch.weights_B[rows]), []
        for number, view in enumerate(views):
            images = view(batch.images_BSSC[rows], batch.ids_B[rows])
            logits = logits_of(model, normalize(images, data), data).float()
            sums_V.append(batch_sums(logits, *targets))
            if predictions is not None and number == 0:
                predictions.add(logits, *targets, batch.ids_B[rows], batch.images_BSSC[rows])
        rows_P.append(torch.stack(sums_V))
    return rows_P


def total_of(table: Tensor) -> Tensor:
    """Return the sum over the forward passes, the first axis, added one after the other, however the set was cut."""
    total = torch.zeros(table.shape[1:], dtype=torch.float64, device=table.device)
    for row in table:
        total += row
    return total


def metrics_of(sums_4: Sequence[float], bad: Sequence[str], index: Index) -> dict[str, float]:
    """Return the metrics from the sums over all samples of a set. bad: in sorted order, with reasons.

    Raises TooManyBadSamples where all samples are bad, UserError where there are none.
    """
    loss, top1, top5, seen = sums_4
    if not seen:
        problem = f"none of the {index.num_samples} samples of {index.location} can be evaluated"
        if bad:
            raise TooManyBadSamples(f"{problem}; the first that could not be decoded is {bad[0]}")
        raise UserError(problem)
    metrics = {
        "eval/loss": loss / seen,
        "eval/top1": top1 / seen,
        "eval/samples": seen,
        "eval/bad_samples": float(len(bad)),
    }
    if len(index.classes) > TOP:
        metrics["eval/top5"] = top5 / seen
    return metrics


def logits_of(model: nn.Module, images_BCSS: Tensor, data: Data) -> Tensor:
    """Return logits (B, classes); with `data.eval_flip` and `data.eval_shift` their mean over the variants of an image."""
    return averaged_logits(
        model, images_BCSS, flip=data.eval_flip, shift=data.eval_shift, confidence=data.eval_confidence
    )


def batch_sums(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sums of loss, top-1 hits, top-5 hits, and the sum of weights: (4,), float64."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    ranked = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    hits = (ranked == labels[:, None]).to(weights.dtype)
    columns = torch.stack([losses, hits[:, 0], hits.sum(dim=1), torch.ones_like(losses)])
    return (columns * weights).sum(dim=1, dtype=torch.float64)
