"""cifar10_fast, cifar10_fast_muon and airbench94 on the same card, in the same call.

The clock of a run has three parts, each to the end of the device's work: whitening filters from 5,000 decoded images; all
training steps, ours from the request of the first batch, theirs from the first crop; the evaluation, mirrored and shifted.
`total_seconds` is their sum, as the source counts. Excluded: reading and decoding the set, the drawn weights, and what
compiles or chooses kernels, once before the first seed, whose result is discarded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from resnet_dist.config import Data, Recipe
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.batches.resident import Samples
from resnet_dist.data.shards.index import read_index
from resnet_dist.model import MODELS, FastResNet, whitening_filters
from resnet_dist.model.table import FastArchitecture
from resnet_dist.train.device import prepare_device
from resnet_dist.train.evaluate import evaluate, evaluation_order
from resnet_dist.train.plan import Plan, order_of
from resnet_dist.train.start.initial import first_images, initial_state
from resnet_dist.train.state.train_state import TrainState
from resnet_dist.train.step.train_step import TrainStep
from resnet_dist.world import World
from tests.benchmarks.gpu import airbench
from tests.benchmarks.gpu.setting import Result, Results, Run, Setting, small_steps

Value = TypeVar("Value")

WARM_UP_STEPS = 5  # They compile, choose kernels, and average the weights once.
MAX_SEEDS = 50
CLOCK = "whitening, all training steps, and the evaluation, each until the device has finished"

# The evaluations that a run's last weights get once more, outside its clock.
EVALUATIONS: dict[str, dict[str, Any]] = {
    "image alone": {"eval_flip": False, "eval_shift": 0},
    "mirrored": {"eval_shift": 0},
    **{f"averaged below {limit}": {"eval_confidence": limit} for limit in (0.5, 0.7, 0.8)},
}


def ours(setting: Setting) -> Results:
    """Train the jobs with one seed after another, while there is time: compiled, with Muon, and eager."""
    if setting.rehearsal:  # This process is the part's own.
        MODELS["resnet9_fast"] = FastArchitecture((8, 8, 8))
    compiled = setting.choose("reduce-overhead", "none")
    most, few = setting.choose(MAX_SEEDS, 2), setting.choose(10, 2)
    begin = time.monotonic()
    # The job, a label, its way of compilation, the most seeds, and the share of the part's time at which it ends.
    variants: list[tuple[str, str, str, int, float]] = [
        ("cifar10_fast", f"compile={compiled}", compiled, most, 0.45),
        ("cifar10_fast_muon", f"compile={compiled}", compiled, most, 0.9),
        ("cifar10_fast", "eager", "none", few, 1.0),
    ]
    for job, label, mode, seeds, share in variants:
        own = replace(setting, deadline=begin + share * (setting.deadline - begin))
        if own.is_over():
            continue
        name = f"{job}, {label}"
        overrides = [*small_steps(setting, job), f"train.compile={mode}"]
        trained = Ours(own, setting.recipe(job, overrides, setting.cifar))
        yield from many(own, name, trained.run, seeds)
        yield f"{name}, evaluations of the last weights", trained.evaluations()


def theirs(setting: Setting) -> Results:
    """Train airbench94 with one seed after another, while there is time."""
    assert setting.cifar is not None
    data = airbench.read(setting.cifar, setting.device)
    settings = setting.choose(airbench.Settings(), airbench.TINY)
    train = airbench.Training(data, settings, setting.device, setting.now)
    yield from many(setting, "airbench94", train.run, setting.choose(MAX_SEEDS, 2))


def many(setting: Setting, name: str, run: Callable[[int], Run], seeds: int) -> Results:
    """Yield the summary after each seed."""
    found: list[Run] = []
    longest = 0.0
    for seed in range(1, seeds + 1):
        if found and setting.is_over(1.5 * longest):
            return
        start = setting.now()
        found.append(run(seed))
        longest = setting.now() - start  # of the newest: the first one compiles
        yield name, summary(found)


def summary(found: Sequence[Run]) -> Result:
    top1 = [run.top1 for run in found]
    totals = [sum(run[:-1]) for run in found]
    parts = {
        name: statistics.median(getattr(run, name) for run in found) for name in Run._fields if name != "top1"
    }
    return {
        "n": len(found),
        "top1_mean": statistics.fmean(top1),
        "top1_deviation": statistics.stdev(top1) if len(top1) > 1 else None,
        "total_seconds_median": statistics.median(totals),
        "total_seconds_lowest": min(totals),
        "total_seconds_highest": max(totals),
        **parts,
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
        self.setting, self.recipe, self.world = setting, recipe, setting.world
        prepare_device(recipe.train, self.world)
        torch.compiler.reset()
        self.index, self.eval_index = read_index(recipe.data.train), read_index(recipe.data.eval)
        self.plan = Plan.of(recipe, order_of(recipe, self.index))
        self.state = self._first(recipe)
        self.train_step = TrainStep(self.state, recipe, self.plan, self.world)
        self._whiten()
        with self._loader(recipe) as loader:
            for step in range(min(WARM_UP_STEPS, self.plan.total)):
                self.train_step(loader.batch_at(step))
                self.state.step += 1
        self._evaluate(recipe.data)

    def run(self, seed: int) -> Run:
        recipe = self.recipe.model_copy(update={"seed": seed})
        first = self._first(recipe)
        restore(self.state, first.tensors(), first.scalars(), self.world)
        self.train_step.recipe = recipe
        whitening, _ = self._timed(self._whiten)
        with self._loader(recipe) as loader:
            training, _ = self._timed(partial(self._train, loader))
        evaluation, top1 = self._timed(partial(self._evaluate, recipe.data))
        return Run(whitening, training, evaluation, top1)

    def evaluations(self) -> Result:
        """Return the top-1 and the seconds of other evaluations of the newest weights."""
        found: Result = {}
        for name, fields in EVALUATIONS.items():
            data = self.recipe.data.model_copy(update=fields)
            seconds, top1 = self._timed(partial(self._evaluate, data))
            found[name] = {"top1": top1, "seconds": seconds}
        return found

    def _timed(self, call: Callable[[], Value]) -> tuple[float, Value]:
        start = self.setting.now()
        value = call()
        return self.setting.now() - start, value

    def _train(self, loader: Loader) -> None:
        while self.state.step < self.plan.total:
            self.train_step(loader.batch_at(self.state.step))
            self.state.step += 1

    def _first(self, recipe: Recipe) -> TrainState:
        """Return the state at step 0 for a seed, but for the whitening."""
        return initial_state(recipe, len(self.index.classes), self.world)

    def _whiten(self) -> None:
        """Give the first layer its filters, and the average the weights, as `initialize_weights` does."""
        model, recipe = self.state.model, self.recipe
        assert isinstance(model, FastResNet)
        order = evaluation_order(self.index, recipe.data)
        with Kept(self.index, order, recipe.data, self.world, seed=0) as loader:
            model.whiten(whitening_filters(first_images(loader), recipe.model.whitening))
        if self.state.ema is not None:
            self.state.ema.restart()

    def _evaluate(self, data: Data) -> float:
        order = evaluation_order(self.eval_index, data)
        with Kept(self.eval_index, order, data, self.world, seed=0) as loader:
            metrics = evaluate(
                self.state.predictor, loader, self.world, precision=self.recipe.train.precision
            )
        return metrics["eval/top1"]

    def _loader(self, recipe: Recipe) -> Loader:
        return Kept(
            self.index,
            order_of(recipe, self.index),
            recipe.data,
            self.world,
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
