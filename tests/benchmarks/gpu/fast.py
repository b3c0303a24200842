"""cifar10_fast and airbench94 on the same card, in the same call."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
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


def ours(setting: Setting) -> Results:
    """Train cifar10_fast with one seed after another, while there is time."""
    base = on_device(setting)
    for mode in setting.choose(("reduce-overhead", "none"), ("none",)):
        recipe = base.with_overrides([f"train.compile={mode}"])

        seeds = setting.choose(MAX_SEEDS if mode != "none" else 5, 2)
        yield from many(setting, f"cifar10_fast, compile={mode}", Ours(setting, recipe).run, seeds)


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
            return seconds, evaluate(self.state.predictor, eval_loader, self.setting.world)["eval/top1"]

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
    state.load(tensors, scalars, world)
