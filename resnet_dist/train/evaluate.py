"""Evaluate a model: every sample counted once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_dist.config import Data
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.images.augment import normalize
from resnet_dist.data.shards.index import Index
from resnet_dist.errors import TooManyBadSamples, UserError
from resnet_dist.order.samples import Order
from resnet_dist.train.predictions import TOP, PredictionLog
from resnet_dist.world import World


def evaluation_order(index: Index, data: Data) -> Order:
    """Return the order of an evaluation: every sample once, unshuffled, the last step filled up with padding."""
    return Order(index.counts, data.global_batch_size, data.lanes, data.window, seed=0, training=False)


def evaluation_loader(index: Index, data: Data, world: World) -> Loader:
    """Return the loader for `evaluate`. It keeps its threads, and its cache if the recipe has one, between calls."""
    return Loader(index, evaluation_order(index, data), data, world, seed=0)


def evaluate(
    model: nn.Module,
    loader: Loader,
    world: World,
    before_batch: Callable[[], None] = lambda: None,
    report_bad: Callable[[list[str]], None] = lambda texts: None,
    predictions: PredictionLog | None = None,
) -> dict[str, float]:
    """Return the metrics over the loader's index; all ranks call it and get the same.

    They are eval/loss, eval/top1, eval/top5 (with more than five classes), eval/samples and eval/bad_samples.
    Sums are reduced over the ranks and divided once; padding and bad samples have weight 0. A forward pass has as
    many samples as in training.

    `before_batch` may raise to end the evaluation, but on all ranks at the same batch. `report_bad` receives the
    names of all ranks' bad samples, with the reasons, where there are any. `predictions` receives those for each sample.

    Raises TooManyBadSamples where all samples are bad, UserError where there are none.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    bad: list[str] = []
    was_training = model.training
    model.eval()
    try:
        for step in range(loader.order.steps_per_epoch):
            before_batch()
            # Load outside inference_mode: the loader's threads could not write to tensors made inside it.
            batch = loader.batch_at(step)
            bad += batch.bad
            size = loader.data.micro_batch_size or len(batch.ids_B)
            with torch.inference_mode():
                for rows in (slice(first, first + size) for first in range(0, len(batch.ids_B), size)):
                    logits = logits_of(model, normalize(batch.images_BSSC[rows], loader.data), loader.data)
                    targets = batch.labels_B[rows], batch.weights_B[rows]
                    sums += batch_sums(logits.float(), *targets)
                    if predictions is not None:
                        predictions.add(logits.float(), *targets, batch.ids_B[rows], batch.images_BSSC[rows])
    finally:
        model.train(was_training)
    loss, top1, top5, seen, num_bad = world.sum(torch.cat([sums, sums.new_tensor([len(bad)])])).tolist()
    # Every rank has this sum, so all or none enter the collective below.
    if num_bad:
        bad = sorted(text for texts in world.gather(bad) for text in texts)
        report_bad(bad)
    if not seen:
        problem = (
            f"none of the {loader.index.num_samples} samples of {loader.index.location} can be evaluated"
        )
        if bad:
            raise TooManyBadSamples(f"{problem}; the first that could not be decoded is {bad[0]}")
        raise UserError(problem)
    metrics = {
        "eval/loss": loss / seen,
        "eval/top1": top1 / seen,
        "eval/samples": seen,
        "eval/bad_samples": num_bad,
    }
    if len(loader.index.classes) > TOP:
        metrics["eval/top5"] = top5 / seen
    return metrics


def logits_of(model: nn.Module, images_BCSS: Tensor, data: Data) -> Tensor:
    """Return logits (B, classes); with `data.eval_flip` the mean over each image and its mirror image."""
    logits: Tensor = model(images_BCSS)
    if not data.eval_flip:
        return logits
    # Copy the first logits: the next replay of a CUDA graph overwrites its outputs.
    mean: Tensor = (logits.clone() + model(images_BCSS.flip(-1))) / 2
    return mean


def batch_sums(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sums of loss, top-1 hits, top-5 hits, and the sum of weights: (4,), float64."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    ranked = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    hits = (ranked == labels[:, None]).to(weights.dtype)
    columns = torch.stack([losses, hits[:, 0], hits.sum(dim=1), torch.ones_like(losses)])
    return (columns * weights).sum(dim=1, dtype=torch.float64)
