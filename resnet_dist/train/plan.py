"""How long a run is, in steps: the recipe's lengths, resolved once against the data set."""

from __future__ import annotations

from dataclasses import dataclass

from resnet_dist.config import Recipe, steps_of
from resnet_dist.data.shards.index import Index
from resnet_dist.errors import RecipeError
from resnet_dist.order.samples import Order
from resnet_dist.order.sizes import Sizes


@dataclass(frozen=True)
class Plan:
    """The recipe's lengths, in steps, and the image size at each of them."""

    total: int
    warmup: int
    log: int
    eval: int
    checkpoint: int
    ema: int
    milestones: tuple[int, ...]
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

    def steps(length: str, total_steps: int = 0) -> int:
        return steps_of(
            length,
            steps_per_epoch=order.steps_per_epoch,
            global_batch_size=data.global_batch_size,
            total_steps=total_steps,
        )

    total = steps(lengths.length)
    milestones = tuple(steps(length, total) for length in recipe.schedule.milestones)
    if list(milestones) != sorted(milestones):
        raise RecipeError(
            f"schedule.milestones={recipe.schedule.milestones} are steps {milestones}; give them in order"
        )
    ema = max(1, steps(lengths.ema_every, total))
    if lengths.ema_decay is not None and ema > total:
        raise RecipeError(
            f"train.ema_every={lengths.ema_every!r} is {ema} steps, more than the {total} of train.length="
            f"{lengths.length!r}: the average would not move, and the weights of the start be evaluated; use a shorter one"
        )
    return order, Plan(
        total=total,
        warmup=steps(recipe.schedule.warmup, total),
        log=steps(lengths.log_every, total),
        eval=steps(lengths.eval_every, total),
        checkpoint=steps(lengths.checkpoint_every, total),
        ema=ema,
        milestones=milestones,
        sizes=Sizes.of(data, lambda length: steps(length, total)),
    )


def due(step: int, every: int, total: int) -> bool:
    """At every multiple and at the end; 0 means at the end only."""
    return step == total or (every > 0 and step % every == 0)
