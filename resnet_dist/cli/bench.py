"""Commands that measure parts of the package on this machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError

from resnet_dist.cli.options import (
    STARTS_OVER,
    Gpu,
    Overrides,
    err,
    on_interrupt,
    out,
    use_gpu,
)
from resnet_dist.config import DEFAULT_WORKERS, Cache, Crop, Data
from resnet_dist.config.part import explain
from resnet_dist.errors import UserError
from resnet_dist.system.streams import need_stdout


@on_interrupt(STARTS_OVER)
def bench_loader(
    shards: Annotated[str, typer.Argument(help="A folder or URL with an index.json.")],
    image_size: Annotated[int, typer.Option(min=1, help="Pixels, height and width.")] = 224,
    global_batch_size: Annotated[
        int, typer.Option("--global-batch-size", "--batch-size", min=1, help="Samples per batch.")
    ] = 64,
    crop: Annotated[Crop, typer.Option(help="As data.crop of a recipe.")] = "random-resized-crop",
    cache: Annotated[Cache, typer.Option(help="As data.cache of a recipe.")] = "none",
    loader_workers: Annotated[
        int | None, typer.Option(min=1, help="Threads, as data.loader_workers.")
    ] = None,
    against: Annotated[
        Literal["raw"] | None, typer.Option(help="raw: decoding alone, in the same run.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Measure images per second of the loader alone: random crops and flips, uint8 batches."""
    need_stdout()
    from resnet_dist.bench.loader import bench_loader as measure

    try:
        data = Data(
            train=shards,
            eval=shards,
            image_size=image_size,
            global_batch_size=global_batch_size,
            lanes=math.gcd(global_batch_size, 8),
            crop=crop,
            flip=True,
            cache=cache,
        )
    except ValidationError as error:
        raise UserError(explain(error, Data)) from None
    speed = measure(data, workers=loader_workers, against_raw=against == "raw", rounds=rounds)
    out.print(
        f"loader     {speed.loader:,.0f} images/s, median of {speed.rounds} rounds, {speed.threads} thread(s)"
    )
    if speed.raw is not None and speed.share_of_raw is not None:
        out.print(f"raw decode {speed.raw:,.0f} images/s, the loader reaches {speed.share_of_raw:.0%}")
    if speed.bad:
        out.print(
            f"bad        {len(speed.bad):,} of {speed.num_samples:,} samples, not counted; the first is {speed.bad[0]}"
        )
    out.print(f"memory     {speed.peak_bytes / 2**20:,.0f} MiB at most")


@on_interrupt(STARTS_OVER)
def bench_step(
    model: Annotated[str, typer.Option(help="As model.name of a recipe.")] = "resnet20",
    image_size: Annotated[int, typer.Option(min=1, help="Pixels, height and width.")] = 32,
    global_batch_size: Annotated[int, typer.Option(min=1, help="Samples per step, over all ranks.")] = 128,
    ranks: Annotated[int, typer.Option(min=1, help="Processes; one GPU each, or a share of the CPUs.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps per round.")] = 20,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    precision: Annotated[str, typer.Option(help="As train.precision of a recipe.")] = "fp32",
    bare_buffers: Annotated[
        Literal["every-step", "none"],
        typer.Option(
            help="When the bare loop's DDP broadcasts rank 0's batch norm statistics; DDP's default: every step."
        ),
    ] = "every-step",
    gpu: Gpu = None,
    overrides: Overrides = None,
) -> None:
    """Measure images per second of the training loop, against a bare PyTorch loop in the same run."""
    need_stdout()
    from resnet_dist.bench.machine import describe_machine
    from resnet_dist.bench.step import bench_step as measure

    gpu = use_gpu(gpu)
    out.print(f"machine  {describe_machine(gpu=gpu)}")
    speed = measure(
        model=model,
        image_size=image_size,
        global_batch_size=global_batch_size,
        overrides=[f"train.precision={precision}", *(overrides or ())],
        ranks=ranks,
        steps=steps,
        rounds=rounds,
        gpu=gpu,
        sync_buffers=bare_buffers != "none",
    )
    out.print(
        f"setting  {model}, {image_size} x {image_size} pixels, {global_batch_size} images a step, {ranks} rank(s), {precision}, "
        + (f"bare loop's buffers: {bare_buffers}, " if ranks > 1 else "")
        + f"medians of {rounds} rounds of {steps} steps each (lowest to highest)"
    )
    _print_rounds("ours", speed.ours, ",.1f", "images/s")
    _print_rounds("bare", speed.bare, ",.1f", "images/s")
    _print_rounds("ratio", speed.ratios, ".4f")
    out.print(f"loss     {speed.our_loss:.6f}, bare {speed.bare_loss:.6f}, over the same first {steps} steps")
    if not speed.same_work:
        err.print("error: the loops do not do the same work: their losses differ")
        raise typer.Exit(1)


@on_interrupt(STARTS_OVER)
def bench_launch(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.py")] = Path("jobs/digits.py"),
    workers: Annotated[int, typer.Option(min=1, help="DDP ranks.")] = DEFAULT_WORKERS,
    local: Annotated[bool, typer.Option("--local", help="Without Ray, against plain PyTorch.")] = False,
    gpu: Gpu = None,
    rounds: Annotated[int, typer.Option(min=1, help="Starts of each program.")] = 5,
) -> None:
    """Measure seconds from the command to the first step of `train`, against a minimal Ray Train program."""
    need_stdout()
    from resnet_dist.bench.machine import describe_machine
    from resnet_dist.bench.startup import bench_launch as measure

    gpu = use_gpu(gpu)
    out.print(f"machine  {describe_machine(gpu=gpu)}")
    speed = measure(recipe, workers=workers, local=local, gpu=gpu, rounds=rounds)
    where = "in one process" if local else f"{workers} rank(s) under Ray"
    out.print(f"setting  {recipe}, {where}, medians of {rounds} starts of each (lowest to highest)")
    _print_rounds("train", speed.ours, ".2f", "s to the first step")
    _print_rounds("minimal", speed.minimal, ".2f", "s to the first step")
    _print_rounds("ratio", speed.ratios, ".3f")
    for part, length in speed.parts.items():
        out.print(f"         {length:6.2f} s  {part}")


@on_interrupt(STARTS_OVER)
def bench_scale(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.py")] = Path("jobs/imagenet_rn50.py"),
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 8,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    samples: Annotated[int, typer.Option(min=1, help="Samples of the training set.")] = 1_281_167,
    sample_bytes: Annotated[int, typer.Option(min=1, help="Mean bytes of a sample in its shard.")] = 110_000,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a shard.")] = 2**28,
    images_per_second: Annotated[float, typer.Option(min=1, help="Images/s of a rank, as measured.")] = 2500,
    link_gbits: Annotated[float, typer.Option(min=0.001, help="Gbit/s of a node's link.")] = 25,
    overrides: Overrides = None,
) -> None:
    """Compute the load of a run on many nodes: downloads, caches, requests, checkpoints; and what breaks first."""
    need_stdout()
    from resnet_dist.bench.scale import GIGABIT_BYTES, DataSet, Nodes, first_to_break, plan_scale
    from resnet_dist.config import load_recipe

    loads = plan_scale(
        load_recipe(recipe, overrides or ()),
        DataSet(samples, sample_bytes, shard_bytes),
        Nodes(nodes, ranks_per_node, images_per_second, link_gbits * GIGABIT_BYTES),
    )
    for load in loads:
        part = f"{load.share:9.1%} of the limit" if load.limit is not None else ""
        out.print(f"{load.name:<48} {load.text:>14} {part}".rstrip())
    first = first_to_break(loads)
    out.print(
        f"\nnearest to its limit: {first.name}, {first.share:.1%} of {first.limit_text}; {first.advice}"
    )


def _print_rounds(name: str, values: Sequence[float], form: str, unit: str = "") -> None:
    """Print the median of all rounds, and the lowest and highest."""
    median, lowest, highest = (
        format(value, form) for value in (statistics.median(values), min(values), max(values))
    )
    out.print(f"{name:<8} {median}{unit and ' ' + unit} ({lowest} to {highest})")
