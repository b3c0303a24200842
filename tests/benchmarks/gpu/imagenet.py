"""Images/s of ResNet-50 at 224 pixels: eager and compiled, with and without each option, synthetic and from shards."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from resnet_dist.config import Recipe
from resnet_dist.data.batches.loader import Batch, Loader
from resnet_dist.data.shards.index import Index, Shard, read_index
from resnet_dist.train.device import has_compiler, prepare_device
from resnet_dist.train.plan import Plan, order_of
from resnet_dist.train.start.initial import initial_state
from resnet_dist.train.step.train_step import TrainStep
from tests.benchmarks.gpu.setting import Result, Results, Setting, repeated

RECORD_IMAGES_PER_SECOND = 7_950  # ResNet-50 on an H200 in MLPerf, with data
SECONDS_TO_COMPILE = 100
# The name of a measurement, its overrides, and whether images are channels-last.
VARIANTS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("eager", (), True),
    ("eager, not channels-last", (), False),
    ("eager, EMA", ("train.ema_decay=0.9999",), True),
    ("compiled", ("train.compile=default",), True),
    ("compiled, EMA", ("train.compile=default", "train.ema_decay=0.9999"), True),
    ("compiled, reduce-overhead", ("train.compile=reduce-overhead",), True),
)


def measure(setting: Setting) -> Results:
    compiles = has_compiler(setting.device.type)
    shards = setting.photographs and repeated(
        setting.photographs / "train", setting.work / "photographs", setting.choose(40_000, 64)
    )
    done = 0
    for name, overrides, channels_last in VARIANTS:
        is_compiled = any("compile" in override for override in overrides)
        if setting.is_over(setting.choose(SECONDS_TO_COMPILE if is_compiled else 15, 0)) or (
            is_compiled and not compiles
        ):
            continue
        yield name, summary(speeds(setting, overrides, channels_last=channels_last))
        done += 1
        if shards and name in ("eager", "compiled"):
            for decode in ("cpu", *(("gpu",) if not setting.rehearsal else ())):
                if not setting.is_over(setting.choose(20, 0)):
                    more = [
                        *overrides,
                        f"data.train={shards}",
                        f"data.eval={shards}",
                        f"data.decode={decode}",
                    ]
                    yield f"{name}, from shards, decode={decode}", summary(speeds(setting, more))


def summary(found: Sequence[float]) -> Result:
    return {
        "images_per_second": round(statistics.median(found), 1),
        "lowest": round(min(found), 1),
        "highest": round(max(found), 1),
        "n": len(found),
        "share_of_7950": round(statistics.median(found) / RECORD_IMAGES_PER_SECOND, 4),
    }


def speeds(setting: Setting, overrides: Sequence[str], *, channels_last: bool = True) -> list[float]:
    """Return images/s of rounds of steps, after one that compiles and chooses kernels."""
    size = setting.choose(256, 8)
    options = [f"data.global_batch_size={size}", f"data.micro_batch_size={size}", "data.lanes=4"]
    options += ["data.prefetch_batches=4", "data.prefetch_bytes=4294967296"]
    recipe = setting.recipe("imagenet_rn50", [*options, *overrides], None)
    prepare_device(recipe.train, setting.world)
    torch.compiler.reset()  # Without it, torch would not compile the eighth network of a process any more.
    is_synthetic = recipe.data.train.startswith("synthetic")
    index = synthetic_index() if is_synthetic else read_index(recipe.data.train)
    order = order_of(recipe, index)
    state = initial_state(recipe, 1_000, setting.world)
    if not channels_last:
        state.model.to(memory_format=torch.contiguous_format)
    step_type = TrainStep if channels_last else PlainLayout
    train_step = step_type(state, recipe, Plan.of(recipe, order), setting.world)
    with ExitStack() as stack:
        batch_at: Callable[[int], Batch]
        if is_synthetic:
            batch = synthetic_batch(recipe, setting)
            batch_at = lambda step: batch  # noqa: E731
        else:
            batch_at = stack.enter_context(Loader(index, order, recipe.data, setting.world, seed=0)).batch_at
        return timed_rounds(setting, train_step, batch_at)


def timed_rounds(setting: Setting, train_step: TrainStep, batch_at: Callable[[int], Batch]) -> list[float]:
    rounds, steps = setting.choose((5, 20), (2, 2))
    found: list[float] = []
    for number in range(rounds + 1):
        start, images = setting.now(), 0
        for _ in range(steps):
            batch = batch_at(train_step.state.step)
            train_step(batch)
            train_step.state.step += 1
            images += len(batch.ids_B)
        if number:
            found.append(images / (setting.now() - start))
    return found


class PlainLayout(TrainStep):
    """A step whose images lie channel by channel in memory."""

    def inputs_of(self, batch: Batch, number: int, size: int) -> tuple[Tensor | None, ...]:
        images, *rest = super().inputs_of(batch, number, size)
        assert images is not None
        return images.contiguous(), *rest


def synthetic_index() -> Index:
    """Return an index of as many samples as ImageNet has: the plan needs their number."""
    shards = tuple(Shard(f"{number}.tar", 0, "", 1_281) for number in range(1_000))
    return Index("synthetic", shards, tuple(map(str, range(1_000))))


def synthetic_batch(recipe: Recipe, setting: Setting) -> Batch:
    size, count = recipe.data.image_size, recipe.data.global_batch_size
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8).to(setting.device)
    labels = torch.randint(0, 1_000, (count,)).to(setting.device)
    return Batch(images, labels, torch.ones(count, device=setting.device), np.arange(count), (), 0.0)
