"""train.deterministic: what it costs, and whether two runs have the same bits, with it and without."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from resnet_dist.config import Recipe
from resnet_dist.train.loop import train
from resnet_dist.train.tracker import NullTracker
from tests.benchmarks.gpu.imagenet import speeds, summary
from tests.benchmarks.gpu.setting import Result, Results, Setting

RUNS = 2


def measure(setting: Setting) -> Results:
    if setting.cifar is not None:
        for deterministic in ("true", "false"):
            name = f"resnet20, {setting.choose(300, 4)} steps, train.deterministic={deterministic}"
            yield name, apart(setting, same_bits, deterministic)
    for deterministic in ("false", "true"):
        if setting.is_over(15):
            return
        yield f"resnet50, eager, train.deterministic={deterministic}", apart(setting, speed, deterministic)


def apart(setting: Setting, measured: Callable[[Setting, str], Result], deterministic: str) -> Result:
    """Return a measurement of one value by a process of its own: cuBLAS keeps the workspace that it began with."""
    if setting.rehearsal:
        return measured(setting, deterministic)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, setting, deterministic).result()


def speed(setting: Setting, deterministic: str) -> Result:
    return summary(speeds(setting, [f"train.deterministic={deterministic}"]))


def same_bits(setting: Setting, deterministic: str) -> Result:
    """Train a ResNet-20 a few hundred steps, twice, and once resumed in the middle."""
    recipe = setting.recipe(
        "cifar10_resnet",
        [
            *(f"train.deterministic={deterministic}", "data.cache=device", "train.precision=bf16"),
            *(f"train.length={setting.choose(300, 4)} steps", "train.eval_every=0 steps"),
            *(["data.global_batch_size=16", "data.micro_batch_size=8"] if setting.rehearsal else []),
            f"train.checkpoint_every={setting.choose(150, 2)} steps",
            *("schedule.decay=constant", "schedule.milestones=[]", "schedule.warmup_start=0.5"),
        ],
        setting.cifar,
    )
    digests = [run(setting, recipe, f"{deterministic}-{number}", 0) for number in range(RUNS)]
    resumed = [run(setting, recipe, f"{deterministic}-resumed", stop) for stop in (setting.choose(150, 2), 0)]
    return {
        "same_bits": len(set(digests)) == 1,
        "same_bits_resumed": resumed[-1] == digests[0],
        "runs": RUNS,
    }


def run(setting: Setting, recipe: Recipe, name: str, stop_after: int) -> str:
    """Train, or resume; return the digest of the last checkpoint's weights. stop_after: steps; 0 trains to the end."""
    calls = iter(range(1, 10**9))
    folder = setting.work / f"repeat-{name}"
    train(recipe, folder, setting.world, NullTracker(), lambda: next(calls) == stop_after)
    torch.use_deterministic_algorithms(False)
    [*_, last] = sorted((folder / "checkpoints").glob("step-*"))
    return hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()
