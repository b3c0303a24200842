"""cifar10_fast and airbench94 on the same card, in the same call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from resnet_dist.config import Recipe
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.batches.resident import Samples
from resnet_dist.data.shards.index import read_index
from resnet_dist.train.device import prepare_device
from resnet_dist.train.evaluate import evaluate, evaluation_order
from resnet_dist.train.plan import Plan, order_of
from resnet_dist.train.start.initial import initial_state, initialize_weights
from resnet_dist.train.state.train_state import TrainState
from resnet_dist.train.step.train_step import TrainStep
from resnet_dist.world import World
from tests.benchmarks.gpu import airbench
from tests.benchmarks.gpu.setting import Result, Results, Setting, on_device

WARM_UP_STEPS = 5  # They compile, choose kernels, and average the weights once.
MAX_SEEDS = 50
# Ours from the request of the first batch; theirs from the first crop. Both exclude reading, decoding, the first weights
# with whitening, the evaluation, and the steps that compile, whose result is discarded.
CLOCK = "all training steps, until the device has finished the last one"

Run = Callable[[int], tuple[float, float]]  # from a seed to seconds and top-1


# The rates and momenta of airbench94's version with Muon; batches, length and net stay those of the job.
MUON = (
    *("optim.optimizer=muon", "optim.ns_steps=3", "optim.lr=0.24", "optim.momentum=0.6"),
    *("optim.sgd_lr=0.67", "optim.sgd_momentum=0.85", "optim.weight_decay=0", "optim.bias_lr_scale=1"),
    *("schedule.warmup=0 steps", "schedule.warmup_start=0", "schedule.floor=0"),
)


def ours(setting: Setting) -> Results:
    """Train cifar10_fast with one seed after another, while there is time; then with Muon, and eager."""
    base = on_device(setting)
    compiled, few = setting.choose("reduce-overhead", "none"), setting.choose(10, 2)
    begin = time.monotonic()
    # The name, the overrides, the most seeds, and the share of the part's time at which the variant ends.
    variants: list[tuple[str, tuple[str, ...], int, float]] = [
        (f"compile={compiled}", (f"train.compile={compiled}",), setting.choose(MAX_SEEDS, 2), 0.6),
        (f"muon, compile={compiled}", (*MUON, f"train.compile={compiled}"), few, 0.85),
        ("eager", ("train.compile=none",), few, 1.0),
    ]
    for name, overrides, seeds, share in variants:
        own = replace(setting, deadline=begin + share * (setting.deadline - begin))
        if not own.is_over():
            run = Ours(own, base.with_overrides(overrides)).run
            yield from many(own, f"cifar10_fast, {name}", run, seeds)


def theirs(setting: Setting) -> Results:
    """Train airbench94 with one seed after another, while there is time."""
    assert setting.cifar is not None
    data = airbench.read(setting.cifar, setting.device)
    settings = setting.choose(airbench.Settings(), airbench.TINY)
    train = airbench.Training(data, settings, setting.device, setting.now)
    yield from many(setting, "airbench94", train.run, setting.choose(MAX_SEEDS, 2))


def many(setting: Setting, name: str, run: Run, seeds: int) -> Results:
    """Yield the summary after each seed; the first run also compiles, outside its clock."""
    found: list[tuple[float, float]] = []
    longest = 0.0
    for seed in range(1, seeds + 1):
        if found and setting.is_over(1.5 * longest):
            return
        start = setting.now()
        found.append(run(seed))
        longest = setting.now() - start  # of the newest: the first one compiles
        yield name, summary(found)


def summary(found: Sequence[tuple[float, float]]) -> Result:
    seconds, top1 = zip(*found, strict=True)
    return {
        "n": len(found),
        "top1_mean": statistics.fmean(top1),
        "top1_deviation": statistics.stdev(top1) if len(top1) > 1 else None,
        "seconds_median": statistics.median(seconds),
        "seconds_lowest": min(seconds),
        "seconds_highest": max(seconds),
        "clock": CLOCK,
    }


class Kept(Loader):
    """A loader whose decoded set serves all seeds."""

    decoded: ClassVar[dict[str, Samples]] = {}

    def _decode_all(self) -> Samples:
        place = self.index.location
        if place not in self.decoded:
            self.decoded[place] = super()._decode_all()
        return self.decoded[place]


class Ours:
    """The recipe's training, compiled once for all seeds. The steps are those of `train`, without log lines."""

    def __init__(self, setting: Setting, recipe: Recipe) -> None:
        self.setting, self.recipe, world = setting, recipe, setting.world
        prepare_device(recipe.train, world)
        torch.compiler.reset()
        self.index, self.eval_index = read_index(recipe.data.train), read_index(recipe.data.eval)
        self.plan = Plan.of(recipe, order_of(recipe, self.index))
        self.state = self._first(recipe)
        self.train_step = TrainStep(self.state, recipe, self.plan, world)
        with self._loader(recipe) as loader:
            for step in range(min(WARM_UP_STEPS, self.plan.total)):
                self.train_step(loader.batch_at(step))
                self.state.step += 1

    def run(self, seed: int) -> tuple[float, float]:
        """Return the seconds of all steps of a run, and its top-1."""
        recipe = self.recipe.model_copy(update={"seed": seed})
        first = self._first(recipe)
        restore(self.state, first.tensors(), first.scalars(), self.setting.world)
        self.train_step.recipe = recipe
        with self._loader(recipe) as loader:
            start = self.setting.now()
            while self.state.step < self.plan.total:
                self.train_step(loader.batch_at(self.state.step))
                self.state.step += 1
            seconds = self.setting.now() - start
        order = evaluation_order(self.eval_index, recipe.data)
        with Kept(self.eval_index, order, recipe.data, self.setting.world, seed=0) as eval_loader:
            metrics = evaluate(
                self.state.predictor, eval_loader, self.setting.world, precision=recipe.train.precision
            )
            return seconds, metrics["eval/top1"]

    def _first(self, recipe: Recipe) -> TrainState:
        """Return the state at step 0 for a seed."""
        state = initial_state(recipe, len(self.index.classes), self.setting.world)
        initialize_weights(state, recipe, self.index, self.setting.world, print)
        return state

    def _loader(self, recipe: Recipe) -> Loader:
        return Kept(
            self.index,
            order_of(recipe, self.index),
            recipe.data,
            self.setting.world,
            seed=recipe.seed,
            total_steps=self.plan.total,
        )


def restore(
    state: TrainState, tensors: dict[str, dict[str, Tensor]], scalars: dict[str, Any], world: World
) -> None:
    """Put everything that a checkpoint holds to these values; what steps have added to the optimizer besides goes."""
    known = {*tensors["optimizer"], *scalars["optimizer"]}
    for name, parameter in state.model.named_parameters():
        for key in list(state.optimizer.state.get(parameter, {})):
            if f"{name}/{key}" not in known:
                del state.optimizer.state[parameter][key]
    for number, (group, settings) in enumerate(
        zip(state.optimizer.param_groups, state._settings, strict=True)
    ):
        for key in [key for key in group if key not in settings and f"groups.{number}/{key}" not in known]:
            del group[key]
    state.load(tensors, scalars, world)
