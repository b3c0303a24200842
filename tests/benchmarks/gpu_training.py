"""Training on a GPU: the figures that the jobs expect, in calls of under ten minutes. Needs neither Ray nor MLflow.

    python tests/benchmarks/gpu_training.py cifar FOLDER --depth 20 [--seed 0]     repeat until it prints a result
    python tests/benchmarks/gpu_training.py fast FOLDER [--seeds 20]
    python tests/benchmarks/gpu_training.py throughput [--shards FOLDER]
    python tests/benchmarks/gpu_training.py report

FOLDER is the prepared CIFAR-10: `resnet-dist prepare cifar10 FOLDER`, or the same from an image folder. Every part
appends a line to --results, which includes the overrides by --set. `cifar` and `fast` stop by themselves after
--minutes. Called again, `cifar` resumes from its checkpoint; `fast` reports the seeds that it has finished and starts
over when it is called again, as does `throughput`. It needs torch 2.11 or newer. Without CUDA it runs on the CPU, as a
rehearsal, and every line has "cpu" as its device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnet_dist.config import Recipe, load_recipe
from resnet_dist.data.batches.loader import Batch, Loader
from resnet_dist.data.shards.index import Index, Shard, read_index
from resnet_dist.train.device import prepare_device
from resnet_dist.train.evaluate import evaluate, evaluation_loader
from resnet_dist.train.loop import Outcome, train
from resnet_dist.train.plan import Plan, order_of
from resnet_dist.train.start.initial import initial_state, initialize_weights
from resnet_dist.train.state.train_state import TrainState
from resnet_dist.train.step.train_step import TrainStep
from resnet_dist.train.tracker import NullTracker
from resnet_dist.world import World

JOBS = Path(__file__).parents[2] / "jobs"
RECORD_IMAGES_PER_SECOND = 7_950  # ResNet-50 on an H200 in MLPerf, with data
# Percent, He et al. 2015, table 6; for 110 layers the mean of five runs, of which the best has 6.43.
PAPER_ERROR = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.61}
WARM_UP_STEPS = 5  # They compile, choose kernels, and average the weights once.
GPU = torch.cuda.is_available()
DEVICE = torch.cuda.get_device_name() if GPU else "cpu"


class Printer(NullTracker):
    """A Tracker that prints metrics and notes."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        print(
            f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True
        )

    def note(self, text: str) -> None:
        print(text, flush=True)


def run(recipe: Recipe, folder: Path, minutes: float) -> Outcome:
    """Train from the newest checkpoint in `folder`, until the end or for so many minutes."""
    deadline = time.monotonic() + 60 * minutes
    return train(recipe, folder, World.single(gpu=GPU), Printer(), lambda: time.monotonic() > deadline)


def cifar(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Train cifar10_resnet at its full length, against the paper's error. None: not finished, call it again."""
    depth, seed = arguments.depth, arguments.seed
    overrides = [
        *data_of(arguments.folder),
        f"model.name=resnet{depth}",
        f"seed={seed}",
        "data.cache=device",
        "data.micro_batch_size=128",
        "train.precision=bf16",
        f"train.compile={arguments.compile}",
        "train.eval_every=20 epochs",
        *(["schedule.warmup=400 steps"] if depth == 110 else []),
    ]
    recipe = load_recipe(JOBS / "cifar10_resnet.py", [*overrides, *arguments.overrides])
    outcome = run(recipe, arguments.work / f"cifar-{depth}-{seed}", arguments.minutes)
    if not outcome.finished:
        print(f"at step {outcome.step} of {outcome.total_steps}: call it again to resume")
        return None
    return {
        "depth": depth,
        "seed": seed,
        "error_percent": 100 * (1 - outcome.metrics["eval/top1"]),
        "paper_error_percent": PAPER_ERROR.get(depth),
    }


def fast(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Train cifar10_fast with many seeds. None: no seed was finished.

    The time includes all steps of a run, from the request of the first batch until the device has finished the last
    step. It excludes reading the data, the first weights, evaluation, and WARM_UP_STEPS steps that compile, whose
    result is discarded. The steps are those of `train`, but without its log lines, two in a run.
    """
    recipe = load_recipe(
        JOBS / "cifar10_fast.py",
        [*data_of(arguments.folder), f"train.compile={arguments.compile}", *arguments.overrides],
    )
    deadline = time.monotonic() + 60 * arguments.minutes
    seconds, accuracies = [], []
    for seed in range(1, arguments.seeds + 1):
        started = time.perf_counter()
        timed = time_run(recipe.model_copy(update={"seed": seed}), deadline)
        if timed is None:
            break
        seconds.append(timed[0])
        accuracies.append(timed[1])
        print(
            f"seed {seed}: {accuracies[-1]:.2%} in {seconds[-1]:.2f} s of steps, "
            f"{time.perf_counter() - started:.1f} s in all",
            flush=True,
        )
    if not accuracies:
        print(f"no seed was finished in {arguments.minutes} minutes")
        return None
    return {
        "n": len(accuracies),
        "top1_mean": statistics.fmean(accuracies),
        "top1_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "seconds_of_steps_median": statistics.median(seconds),
        "seconds_of_steps_lowest": min(seconds),
        "seconds_of_steps_highest": max(seconds),
    }


def time_run(recipe: Recipe, deadline: float) -> tuple[float, float] | None:
    """Return the seconds of all steps of a run, and its top-1 accuracy; None where the deadline comes first."""
    world = World.single(gpu=GPU)
    prepare_device(recipe.train, world)
    torch.compiler.reset()  # Without it, torch would not compile the eighth network of a process any more.
    index, eval_index = read_index(recipe.data.train), read_index(recipe.data.eval)
    order = order_of(recipe, index)
    plan = Plan.of(recipe, order)
    state = initial_state(recipe, len(index.classes), world)
    initialize_weights(state, recipe, index, world, print)
    train_step = TrainStep(state, recipe, plan, world)
    with (
        Loader(index, order, recipe.data, world, seed=recipe.seed, total_steps=plan.total) as loader,
        evaluation_loader(eval_index, recipe.data, world) as eval_loader,
    ):
        warm_up(state, train_step, loader, world)
        start = synchronized()
        while state.step < plan.total:
            if time.monotonic() > deadline:
                return None
            train_step(loader.batch_at(state.step))
            state.step += 1
        seconds = synchronized() - start
        return seconds, evaluate(state.predictor, eval_loader, world)["eval/top1"]


def warm_up(state: TrainState, train_step: TrainStep, loader: Loader, world: World) -> None:
    """Take some steps, then restore `state`."""
    tensors = {
        file: {name: tensor.clone() for name, tensor in group.items()}
        for file, group in state.tensors().items()
    }
    scalars = state.scalars()
    assert not tensors["optimizer"]  # It is cleared below, so it must be empty here.
    for step in range(min(WARM_UP_STEPS, train_step.plan.total)):
        train_step(loader.batch_at(step))
        state.step += 1
    state.load(tensors, scalars, world)
    state.optimizer.state.clear()
    loader.drain()


def throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure images/s of ResNet-50 at 224 pixels, on a synthetic batch and from shards, eager and compiled."""
    found: dict[str, Any] = {}
    for mode in ("none", "default"):
        for source in ("synthetic", *(["shards"] if arguments.shards else [])):
            recipe = imagenet(arguments, mode)
            speeds = measure(recipe, source, arguments)
            name = f"{source}, {'eager' if mode == 'none' else 'compiled'}"
            found[name] = {
                "images_per_second": statistics.median(speeds),
                "lowest": min(speeds),
                "highest": max(speeds),
                "n": len(speeds),
                "batch_size": arguments.batch_size,
                "share_of_7950": statistics.median(speeds) / RECORD_IMAGES_PER_SECOND,
            }
            print(name, found[name], flush=True)
    return found


def imagenet(arguments: argparse.Namespace, mode: str) -> Recipe:
    size = arguments.batch_size
    shards = str(arguments.shards or "synthetic")  # Nothing is read from the latter.
    return load_recipe(
        JOBS / "imagenet_rn50.py",
        [
            f"data.train={shards}",
            f"data.eval={shards}",
            f"data.global_batch_size={size}",
            f"data.micro_batch_size={size}",
            "data.lanes=8",
            f"train.compile={mode}",
            "data.prefetch_batches=4",
            "data.prefetch_bytes=4294967296",
            *arguments.overrides,
        ],
    )


def measure(recipe: Recipe, source: str, arguments: argparse.Namespace) -> list[float]:
    """Return images per second of --rounds rounds of --steps steps, after one that compiles and chooses kernels."""
    world = World.single(gpu=GPU)
    prepare_device(recipe.train, world)
    index = synthetic_index() if source == "synthetic" else read_index(recipe.data.train)
    order = order_of(recipe, index)
    plan = Plan.of(recipe, order)
    state = initial_state(recipe, 1_000, world)
    train_step = TrainStep(state, recipe, plan, world)
    with ExitStack() as stack:
        if source == "synthetic":
            batch = synthetic_batch(recipe, world)
            batch_at: Callable[[int], Batch] = lambda step: batch  # noqa: E731
        else:
            batch_at = stack.enter_context(Loader(index, order, recipe.data, world, seed=0)).batch_at
        speeds: list[float] = []
        for number in range(arguments.rounds + 1):
            start = synchronized()
            for _ in range(arguments.steps):
                train_step(batch_at(state.step))
                state.step += 1
            if number:
                speeds.append(arguments.steps * recipe.data.global_batch_size / (synchronized() - start))
        return speeds


def synthetic_index() -> Index:
    """Return an index of as many samples as ImageNet has: the plan needs their number."""
    shards = tuple(Shard(f"{number}.tar", 0, "", 1_281) for number in range(1_000))
    return Index("synthetic", shards, tuple(map(str, range(1_000))))


def synthetic_batch(recipe: Recipe, world: World) -> Batch:
    size, count = recipe.data.image_size, recipe.data.global_batch_size
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8).to(world.device)
    labels: Tensor = torch.randint(0, 1_000, (count,)).to(world.device)
    return Batch(images, labels, torch.ones(count, device=world.device), np.arange(count), (), 0.0)


def synchronized() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def data_of(folder: Path) -> list[str]:
    return [f"data.train={folder / 'train'}", f"data.eval={folder / 'eval'}", "data.source=none"]


def report(results: Path) -> None:
    for line in results.read_text().splitlines():
        entry = json.loads(line)
        print(
            f"{entry['part']:<11} {entry['device']:<24} torch {entry['torch']:<8} {' '.join(entry['set'])} "
            f"{json.dumps(entry['result'])}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["cifar", "fast", "throughput", "report"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--compile", default="default" if GPU else "none")
    parser.add_argument("--work", type=Path, default=Path("output/gpu"))
    parser.add_argument("--results", type=Path, default=Path("output/gpu/results.jsonl"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.part == "report":
        report(arguments.results)
        return
    if arguments.part in ("cifar", "fast") and arguments.folder is None:
        parser.error(f"{arguments.part} needs FOLDER")
    result = {"cifar": cifar, "fast": fast, "throughput": throughput}[arguments.part](arguments)
    if result is not None:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        line: dict[str, Any] = {
            "part": arguments.part,
            "device": DEVICE,
            "torch": torch.__version__,
            "set": arguments.overrides,
        }
        line["result"] = result
        with arguments.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line))


if __name__ == "__main__":
    main()
