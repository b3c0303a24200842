"""How long a run is, in steps: the recipe's lengths, resolved once against the data set."""

from __future__ import annotations

from dataclasses import dataclass

from resnet_dist.config import Recipe, RecipeError, steps_of
from resnet_dist.data.index import Index
from resnet_dist.data.order import Order
from resnet_dist.data.sizes import Sizes


@dataclass(frozen=True)
class Plan:
    """The recipe's lengths, in steps, and the image size at each of them."""

    total: int
    warmup: int
    log: int
    eval: int
    checkpoint: int
    sizes: Sizes


def plan_of(recipe: Recipe, train_index: Index) -> tuple[Order, Plan]:
    """The order of the training set, and every length of the recipe in steps. Raises RecipeError."""
    data, lengths = recipe.data, recipe.train
    order = Order(
        train_index.counts,
        data.global_batch_size,
        data.lanes,
        data.window,
        recipe.seed,
        training=True,
        repeats=data.repeats,
    )
    if order.steps_per_epoch == 0:
        raise RecipeError(
            f"data.global_batch_size={data.global_batch_size} is more than the {order.num_samples} samples of "
            f"{train_index.location}, data.repeats={data.repeats} times each; use a smaller one"
        )

    def steps(length: str) -> int:
        return steps_of(
            length, steps_per_epoch=order.steps_per_epoch, global_batch_size=data.global_batch_size
        )

    return order, Plan(
        total=steps(lengths.length),
        warmup=steps(recipe.schedule.warmup),
        log=steps(lengths.log_every),
        eval=steps(lengths.eval_every),
        checkpoint=steps(lengths.checkpoint_every),
        sizes=Sizes.of(data, steps),
    )


def due(step: int, every: int, total: int) -> bool:
    """At every multiple and at the end; 0 means at the end only."""
    return step == total or (every > 0 and step % every == 0)
