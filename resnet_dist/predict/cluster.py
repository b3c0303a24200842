"""Predictions by the workers of a Ray cluster: the same rows in the same order as those of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from resnet_dist.predict.classify import MAX_BATCH, Prediction, predictions
from resnet_dist.predict.unread import Input
from resnet_dist.train.checkpoint.load import TrainedModel

BATCHES_PER_CALL = 4  # A worker decodes the next ones while the model has one.
Map = Callable[..., Iterator[list[Any]]]


class Classifier:
    """Classifies batches of inputs in a worker."""

    def __init__(self, trained: TrainedModel, top_k: int, thumbnails: bool, gpu: bool) -> None:
        self._device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        self._trained = replace(trained, model=trained.model.to(self._device))
        self._top_k, self._thumbnails = top_k, thumbnails

    def __call__(self, inputs: Sequence[Input]) -> list[Prediction]:
        batches = predictions(self._trained, inputs, self._device, self._top_k, thumbnails=self._thumbnails)
        return [row for rows in batches for row in rows]


def predictions_on(
    mapped: Map,
    trained: TrainedModel,
    inputs: Iterable[Input],
    top_k: int,
    *,
    thumbnails: bool = False,
    gpu: bool,
) -> Iterator[list[Prediction]]:
    """Yield one prediction for each input, in the same order. mapped: maps a function over items on a cluster."""
    data = trained.recipe.data
    size = min(data.micro_batch_size or data.global_batch_size, MAX_BATCH) * BATCHES_PER_CALL
    items = (given.portable() for given in inputs)
    return mapped(Classifier, (trained, top_k, thumbnails, gpu), items, batch_size=size)
