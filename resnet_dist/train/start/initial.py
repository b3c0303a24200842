"""Step zero: the state that a run begins with, the same on every rank and in every attempt.

A run that has a checkpoint takes its weights from there, and reads neither `model.init_from` nor the data for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from resnet_dist.config import Data, Recipe
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.images.augment import normalize
from resnet_dist.data.shards.index import Index
from resnet_dist.model import FastResNet, build_model, match, whitening_filters
from resnet_dist.train.evaluate import evaluation_loader
from resnet_dist.train.optim.build import build_optimizer
from resnet_dist.train.start.init_from import Weights, check_match, load_weights, read_shapes, read_weights
from resnet_dist.train.start.shapes import shapes_only
from resnet_dist.train.state.ema import build_ema
from resnet_dist.train.state.meter import Meter
from resnet_dist.train.state.train_state import TrainState, build_scaler
from resnet_dist.world import World

Value = TypeVar("Value")

WHITENING_IMAGES = 5_000  # as airbench94: five million patches at 32 pixels, for a covariance of 12 x 12


def initial_state(recipe: Recipe, num_classes: int, world: World) -> TrainState:
    """Return the state at step 0: weights drawn from the recipe's seed, and an optimizer that has taken no step."""
    model = build(recipe, num_classes)
    model = model.to(world.device).to(memory_format=torch.channels_last)
    return TrainState(
        model,
        build_optimizer(model, recipe.optim),
        Meter(world.device),
        build_ema(model, recipe.train),
        build_scaler(recipe.train, world.device),
    )


def build(recipe: Recipe, num_classes: int) -> nn.Module:
    return build_model(
        **recipe.model.options(),
        in_channels=recipe.data.channels,
        num_classes=num_classes,
        seed=recipe.seed,
    )


def check_init_from(recipe: Recipe, num_classes: int) -> None:
    """Raise UserError where `model.init_from` cannot be read or holds another network. Cheap: nothing is downloaded."""
    source = recipe.model.init_from
    if source is not None:
        with shapes_only():
            model = build(recipe, num_classes)
        check_match(source, match(model, read_shapes(source)))


def initialize_weights(
    state: TrainState, recipe: Recipe, index: Index, world: World, report: Callable[[str], None]
) -> None:
    """Set the weights of a new run that no seed draws: whitening filters, and `model.init_from`. All ranks call it.

    Raises UserError where the weights cannot be read or are another network's.
    """
    model = state.model
    if isinstance(model, FastResNet):
        images = plain_images(recipe.data, index, world)
        kind = recipe.model.whitening
        model.whiten(from_main(world, lambda: whitening_filters(images, kind).cpu()))
    source = recipe.model.init_from
    if source is not None:
        weights: Weights = from_main(world, lambda: read_weights(source))
        report(f"model.init_from={source}: {load_weights(model, source, weights)}")
    if state.ema is not None:
        state.ema.restart()


def plain_images(data: Data, index: Index, world: World) -> Iterator[Tensor]:
    """Yield training images as a model sees them, without augmentation: (N, C, H, W), the first of every lane.

    They are the same on any number of ranks: one rank reads them as if it were alone.
    """
    alone = replace(world, rank=0, world_size=1)
    with evaluation_loader(index, data.model_copy(update={"cache": "none"}), alone) as loader:
        yield from first_images(loader)


def first_images(loader: Loader) -> Iterator[Tensor]:
    """Yield the first WHITENING_IMAGES good images of a loader, normalized, (N, C, H, W)."""
    seen = 0
    for step in range(loader.order.steps_per_epoch):
        batch = loader.batch_at(step)
        images = normalize(batch.images_BSSC[batch.weights_B > 0], loader.data)
        images = images[: WHITENING_IMAGES - seen]
        yield images
        seen += len(images)
        if seen >= WHITENING_IMAGES:
            return


def from_main(world: World, make: Callable[[], Value]) -> Value:
    """Call `make` on rank 0, and return its result on every rank; an error of it is raised on every rank."""
    result: Value | Exception | None = None
    if world.is_main:
        try:
            result = make()
        except Exception as error:  # any error: the other ranks wait in the broadcast below
            result = error
    result = world.broadcast(result)
    if isinstance(result, Exception):
        raise result
    assert result is not None
    return result
