"""The lengths of a run in steps: the recipe's lengths, resolved once against the data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from resnet_dist.config import Recipe, Schedule, Train, steps_of
from resnet_dist.data.shards.index import Index
from resnet_dist.errors import RecipeError
from resnet_dist.order.samples import Order
from resnet_dist.order.sizes import Sizes
from resnet_dist.order.versions import NEWEST_VERSION


@dataclass(frozen=True)
class Plan:
    """The recipe's lengths in steps, and the image size at each step.

    `log`, `eval`, `checkpoint` and `ema` are intervals; 0 means at the end only (see `due`).
    """

    total: int
    warmup: int
    log: int
    eval: int
    checkpoint: int
    ema: int  # at least 1
    milestones: tuple[int, ...]  # steps at which the "step" schedule decays, in order
    sizes: Sizes
    whitening: int | None = None  # steps for which the bias of a whitening layer trains; None: all

    @classmethod
    def of(cls, recipe: Recipe, order: Order) -> Plan:
        """Resolve the lengths of the recipe against the order of its training set. Raises RecipeError."""

        def steps(length: str, total_steps: int = 0) -> int:
            return steps_of(
                length,
                steps_per_epoch=order.steps_per_epoch,
                global_batch_size=recipe.data.global_batch_size,
                total_steps=total_steps,
            )

        lengths, whitening = recipe.train, recipe.schedule.whitening_bias
        total = steps(lengths.length)
        return cls(
            total=total,
            warmup=steps(recipe.schedule.warmup, total),
            log=steps(lengths.log_every, total),
            eval=steps(lengths.eval_every, total),
            checkpoint=steps(lengths.checkpoint_every, total),
            ema=_ema_steps(lengths, max(1, steps(lengths.ema_every, total)), total),
            milestones=_in_order(
                recipe.schedule, tuple(steps(length, total) for length in recipe.schedule.milestones)
            ),
            sizes=Sizes.of(recipe.data, lambda length: steps(length, total)),
            whitening=None if whitening is None else steps(whitening, total),
        )


def unreached(recipe: Recipe, plan: Plan) -> Iterator[str]:
    """Yield a sentence for each length that a run ends before. None is refused: two steps of any recipe are a dry run."""
    schedule, end = recipe.schedule, f"train.length={recipe.train.length!r}"
    if plan.warmup > plan.total:
        yield f"schedule.warmup={schedule.warmup!r} is longer than {end}: the rate does not reach optim.lr"
    late = [
        length
        for length, step in zip(schedule.milestones, plan.milestones, strict=True)
        if step >= plan.total
    ]
    if late:
        yield f"schedule.milestones: {', '.join(map(repr, late))} are not before the end of {end}: the rate does not fall there"


def moved_lengths(before: Plan, after: Plan) -> list[str]:
    """Return what a continued run would do at other steps than it began with, such as "schedule.warmup from 2 steps to 9 steps".

    Only what a curve depends on counts: logs, evaluations and checkpoints may move.
    """
    pairs = {
        "schedule.warmup": (f"{before.warmup} steps", f"{after.warmup} steps"),
        "schedule.milestones": (f"steps {before.milestones}", f"steps {after.milestones}"),
        "schedule.whitening_bias": (_steps_or_all(before.whitening), _steps_or_all(after.whitening)),
        "train.ema_every": (f"{before.ema} steps", f"{after.ema} steps"),
        "data.train_sizes": (str(before.sizes), str(after.sizes)),
    }
    return [f"{name} from {was} to {now}" for name, (was, now) in pairs.items() if was != now]


def _steps_or_all(steps: int | None) -> str:
    return "all steps" if steps is None else f"{steps} steps"


def order_of(recipe: Recipe, train_index: Index, version: int = NEWEST_VERSION) -> Order:
    """Return the order of the training set, in the version that the run began with.

    Raises RecipeError where the set is smaller than a global batch.
    """
    data = recipe.data
    order = Order(
        train_index.counts,
        data.global_batch_size,
        data.lanes,
        data.window,
        recipe.seed,
        training=True,
        repeats=data.repeats,
        version=version,
    )
    if order.steps_per_epoch == 0:
        raise RecipeError(
            f"data.global_batch_size={data.global_batch_size} is more than the {order.num_samples} samples of "
            f"{train_index.location}, data.repeats={data.repeats} times each; use a smaller one"
        )
    return order


def _in_order(schedule: Schedule, milestones: tuple[int, ...]) -> tuple[int, ...]:
    if list(milestones) != sorted(milestones):
        raise RecipeError(
            f"schedule.milestones={schedule.milestones} are steps {milestones}; give them in order"
        )
    return milestones


def _ema_steps(train: Train, ema: int, total: int) -> int:
    if train.ema_decay is not None and ema > total:
        raise RecipeError(
            f"train.ema_every={train.ema_every!r} is {ema} steps, more than the {total} of train.length="
            f"{train.length!r}: the average would never move, and the initial weights would be evaluated; use a shorter one"
        )
    return ema


def due(step: int, every: int, total: int) -> bool:
    """Report whether `step` is a multiple of `every`, or the last step; `every` 0 means at the end only."""
    return step == total or (every > 0 and step % every == 0)
