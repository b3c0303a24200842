"""The commands. Each parses, calls one function, and prints.

Exit codes: 0 done, 2 a mistake in a recipe or flag (nothing was started), 130 interrupted, 1 otherwise.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from resnet_dist.config import Data, UserError, load_recipe
from resnet_dist.terminal import bars, make_reporter

app = typer.Typer(
    help="Distributed training of residual networks.", no_args_is_help=True, pretty_exceptions_enable=False
)
bench = typer.Typer(help="Measure parts of the package on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
out = Console(soft_wrap=True, highlight=False, markup=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

Output = Annotated[Path, typer.Option(help="Where data, runs and the MLflow store go.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one field.")]
Workers = Annotated[int, typer.Option(min=1, help="DDP ranks.")]
Gpu = Annotated[bool | None, typer.Option("--gpu/--cpu", help="Default: GPUs where there are any.")]
DEFAULT_OUTPUT = Path("output")
DEFAULT_SHARD_CACHE = Path(Data.model_fields["shard_cache"].default)
SHARD_CACHE_BYTES: int = Data.model_fields["shard_cache_bytes"].default
FETCH_TIMEOUT_SECONDS: float = Data.model_fields["fetch_timeout_seconds"].default
Split = Literal["train", "eval"]
Crop = Literal["none", "pad-crop", "random-resized-crop"]
Cache = Literal["none", "ram", "device"]
Against = Literal["raw"]
FEW_SAMPLES = 4096  # which one process writes before others have started
MOST_LINES = 50  # of a report that are shown


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="digits, cifar10, cifar100, mnist, fashion-mnist, or a folder of images (class = folder)."
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Gets train/ and eval/.")],
    shards: Annotated[int | None, typer.Option(min=1, help="Tars per split.")] = None,
    shard_size: Annotated[
        int | None, typer.Option(min=1, metavar="BYTES", help="About this much per tar; default 256 MiB.")
    ] = None,
    resize_short: Annotated[
        int | None,
        typer.Option(min=1, metavar="PIXELS", help="Shrink longer short sides; else bytes are kept."),
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of what is shrunk.")] = 92,
    split: Annotated[
        Split | None, typer.Option(help="Only this one; a folder without splits goes into it whole.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the shuffle.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per CPU.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="An unreadable image is an error.")] = False,
) -> None:
    """Write a data set as shuffled WebDataset shards with an index; interrupted, the same call goes on."""
    from resnet_dist.data.prepare import REPORT_NAME, SHARD_BYTES, Options
    from resnet_dist.data.prepare import prepare as prepare_source
    from resnet_dist.data.sources import open_source

    if shards is not None and shard_size is not None:
        raise UserError(
            f"--shards {shards} and --shard-size {shard_size} both say how to cut; give one of them"
        )
    options = Options(seed, shards, shard_size or SHARD_BYTES, resize_short, quality, strict)
    opened = open_source(source, seed=seed, whole_split=split)
    samples = sum(len(items) for items in opened.splits.values())
    workers = workers or (1 if samples < FEW_SAMPLES else len(os.sched_getaffinity(0)))
    chosen = [split] if split else list(opened.splits)
    with bars(out, chosen, "images") as tell:
        indexes = prepare_source(opened, folder, options, splits=chosen, workers=workers, progress=tell)
    for name, index in indexes.items():
        out.print(f"{name}: {index.num_samples:,} samples in {len(index.shards)} shards, {index.location}")
        report = folder / name / REPORT_NAME
        if report.exists():
            lines = report.read_text().splitlines()
            err.print(f"{name}: left out {len(lines):,} unreadable images, listed in {report}")


@app.command()
def index(
    shards: Annotated[
        list[str],
        typer.Argument(
            metavar="SHARDS...", help="Tars, a{0..9}.tar, lists with ::, folders, other indexes; URLs."
        ),
    ],
    to: Annotated[
        Path | None, typer.Option("--out", help="Index to write; default: beside the shards.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="How many, or a file with a name per line; default: as labels need.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of timm's _info.json.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute checksums and decode every image.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per CPU.")] = None,
    allow_commands: Annotated[
        bool, typer.Option("--allow-commands", help="Run shards named pipe:… in a shell.")
    ] = False,
    shard_cache: Annotated[Path, typer.Option(help="Where remote shards are kept.")] = DEFAULT_SHARD_CACHE,
) -> None:
    """Make an index for WebDataset shards that something else wrote; --verify checks an indexed set."""
    from resnet_dist.data.index import index_location
    from resnet_dist.data.indexing import (
        build_index,
        class_names,
        compressed,
        default_location,
        expand,
        verify_index,
    )
    from resnet_dist.data.remote import exists
    from resnet_dist.data.storage import Limits

    limits = Limits(shard_cache.expanduser(), SHARD_CACHE_BYTES, FETCH_TIMEOUT_SECONDS, allow_commands)
    workers = workers or len(os.sched_getaffinity(0))
    target = to
    if not (verify and len(shards) == 1 and to is None and exists(index_location(shards[0]))):
        found = expand(shards, split)
        target = to or default_location(found)
        if target is None:
            raise UserError("--out: say where the index goes, these shards are not all in one folder here")
        if compressed(found):
            err.print(
                f"{compressed(found)} of {len(found)} shards are compressed: nothing inside them can be read by offset, "
                f"so each is unpacked whole into {limits.folder} before its first use"
            )
        with bars(out, ["index"], "shards") as tell:
            built, problems = build_index(
                found,
                target,
                limits,
                classes=class_names(classes),
                workers=workers,
                progress=lambda done, total: tell("index", done, total),
            )
        out.print(
            f"{built.num_samples:,} samples of {len(built.classes)} classes in {len(built.shards)} shards, {built.location}"
        )
        _report(problems, "samples without a usable image or label")
    if verify:
        location = str(target) if target else shards[0]
        with bars(out, ["verify"], "shards") as tell:
            wrong = verify_index(
                location, limits, workers=workers, progress=lambda done, total: tell("verify", done, total)
            )
        _report(wrong, "problems")
        if wrong:
            raise typer.Exit(1)
        out.print(f"verified {location}: every checksum agrees, every image can be decoded")


def _report(lines: list[str], what: str) -> None:
    for line in lines[:MOST_LINES]:
        err.print(line)
    if lines:
        err.print(f"{len(lines):,} {what}" + (f", {MOST_LINES} shown" if len(lines) > MOST_LINES else ""))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.py")],
    overrides: Overrides = None,
    workers: Workers = 2,
    gpu: Gpu = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; default: one here.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the run; one that exists is continued.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest run of this recipe.")] = False,
    output: Output = DEFAULT_OUTPUT,
) -> None:
    """Train a recipe to its end, or from where its run stopped."""
    value = load_recipe(recipe, overrides or ())
    from resnet_dist.driver import Interrupted, Request, run_training  # torch takes seconds to import

    request = Request(value, str(recipe), output.absolute(), workers, gpu, local, address, name, resume)
    with make_reporter(out) as reporter:
        try:
            summary = run_training(request, reporter, _open_mlflow)
        except Interrupted as interrupted:
            where = f" at step {interrupted.step}" if interrupted.step is not None else ""
            err.print(f"interrupted{where}; this continues it:\n  {_resume_line(interrupted.run.name)}")
            raise typer.Exit(130) from None
    metrics = summary.outcome.metrics
    out.print(
        f"top-1      {metrics['eval/top1']:.2%} of {metrics['eval/samples']:.0f} held-out samples\n"
        f"speed      {metrics['perf/images_per_second']:,.0f} images/s, {summary.seconds:.0f} s in all\n"
        f"checkpoint {_short(summary.checkpoint)}\n"
        f"browse     resnet-dist ui{'' if output == DEFAULT_OUTPUT else f' --output {output}'}"
    )
    if summary.unsent_metrics:
        err.print(
            f"{summary.unsent_metrics} metrics could not be sent to MLflow; they are in {summary.run.spool}"
        )


@app.command()
def submit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.py")],
    address: Annotated[str, typer.Option(help="The cluster's dashboard, such as http://127.0.0.1:8265.")],
    overrides: Overrides = None,
    workers: Workers = 2,
    gpu: Gpu = None,
    name: Annotated[str | None, typer.Option(help="Of the run; one that exists is continued.")] = None,
    resume: Annotated[bool, typer.Option("--resume")] = False,
    output: Annotated[
        Path, typer.Option(help="On the cluster: a folder that all nodes share.")
    ] = DEFAULT_OUTPUT,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the job.")] = False,
) -> None:
    """Train a recipe on a running Ray cluster, through Ray Jobs; follows the log, ends with its exit code."""
    value = load_recipe(recipe, overrides or ())
    from resnet_dist.submit import Submission, submit_job

    submission = Submission(value, recipe, address, workers, gpu, name, resume, output.absolute(), detach)
    raise typer.Exit(submit_job(submission, lambda text: out.print(text, end="")))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint or run folder, or an MLflow run id.")],
    shards: Annotated[str, typer.Argument(help="A folder with an index.json.")],
    gpu: Gpu = None,
    output: Output = DEFAULT_OUTPUT,
) -> None:
    """Top-1, top-5 and loss of a trained model, every sample counted once."""
    import torch

    from resnet_dist.data.index import check_shards, read_index
    from resnet_dist.evaluate import evaluate as evaluate_model
    from resnet_dist.evaluate import evaluation_loader
    from resnet_dist.export import load_model
    from resnet_dist.world import World

    index = read_index(shards)
    check_shards(index)
    world = World.single(gpu=torch.cuda.is_available() if gpu is None else gpu)
    trained = load_model(_model_folder(model, output), world.device)
    if trained.classes != index.classes:
        raise UserError(
            f"{index.location} has classes {index.classes}, the model was trained on {trained.classes}"
        )
    with evaluation_loader(index, trained.recipe.data, world) as loader:
        for key, value in evaluate_model(trained.model, loader, world).items():
            out.print(f"{key:<13} {value:.6g}")


@bench.command("loader")
def bench_loader(
    shards: Annotated[str, typer.Argument(help="A folder or URL with an index.json.")],
    image_size: Annotated[int, typer.Option(min=1, help="Pixels, height and width.")] = 224,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a batch.")] = 64,
    crop: Annotated[Crop, typer.Option(help="As data.crop of a recipe.")] = "random-resized-crop",
    cache: Annotated[Cache, typer.Option(help="As data.cache of a recipe.")] = "none",
    loader_workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per CPU.")] = None,
    against: Annotated[Against | None, typer.Option(help="raw: decoding alone, in the same run.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Images per second of the loader alone: random crops and flips, uint8 batches."""
    from resnet_dist.bench.loader import bench_loader as measure

    data = Data(
        train=shards,
        eval=shards,
        image_size=image_size,
        global_batch_size=batch_size,
        lanes=math.gcd(batch_size, 8),
        crop=crop,
        flip=True,
        cache=cache,
    )
    workers = loader_workers or len(os.sched_getaffinity(0))
    speed = measure(data, workers=workers, against_raw=against == "raw", rounds=rounds)
    out.print(f"loader     {speed.loader:,.0f} images/s, median of {speed.rounds} rounds, {workers} threads")
    if speed.raw is not None and speed.share_of_raw is not None:
        out.print(f"raw decode {speed.raw:,.0f} images/s, the loader reaches {speed.share_of_raw:.0%}")
    out.print(f"memory     {speed.peak_bytes / 2**20:,.0f} MiB at most")


@bench.command("step")
def bench_step(
    model: Annotated[str, typer.Option(help="As model.name of a recipe.")] = "resnet20",
    image_size: Annotated[int, typer.Option(min=1, help="Pixels, height and width.")] = 32,
    global_batch_size: Annotated[int, typer.Option(min=1, help="Samples of a step, over all ranks.")] = 128,
    ranks: Annotated[int, typer.Option(min=1, help="Processes; one GPU each, or a share of the CPUs.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Of a round.")] = 20,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    precision: Annotated[str, typer.Option(help="As train.precision of a recipe.")] = "fp32",
    gpu: Gpu = None,
    overrides: Overrides = None,
) -> None:
    """Images per second of the whole training loop, against a bare PyTorch loop in the same run."""
    import torch  # takes seconds

    from resnet_dist.bench.machine import describe_machine
    from resnet_dist.bench.step import bench_step as measure

    gpu = torch.cuda.is_available() if gpu is None else gpu
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
    )
    out.print(
        f"setting  {model}, {image_size} x {image_size} pixels, {global_batch_size} images a step, {ranks} rank(s), {precision}, "
        f"medians of {rounds} rounds of {steps} steps each (lowest to highest)"
    )
    for name, images in (("ours", speed.ours), ("bare", speed.bare)):
        out.print(
            f"{name:<8} {statistics.median(images):,.1f} images/s ({min(images):,.1f} to {max(images):,.1f})"
        )
    out.print(f"ratio    {speed.ratio:.4f} ({min(speed.ratios):.4f} to {max(speed.ratios):.4f})")
    out.print(
        f"cpu      {speed.cpu_ratio:.4f} ({min(speed.cpu_ratios):.4f} to {max(speed.cpu_ratios):.4f}) by processor time"
    )
    out.print(f"loss     {speed.our_loss:.6f}, bare {speed.bare_loss:.6f}, over the same first {steps} steps")
    if not speed.same_work:
        err.print("error: the loops do not do the same work: their losses differ")
        raise typer.Exit(1)


@bench.command("launch")
def bench_launch(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.py")] = Path("jobs/digits.py"),
    workers: Workers = 2,
    local: Annotated[bool, typer.Option("--local", help="Without Ray, against plain PyTorch.")] = False,
    gpu: Gpu = None,
    rounds: Annotated[int, typer.Option(min=1, help="Starts of each.")] = 5,
) -> None:
    """Seconds from the command to the first step of `train`, against a minimal Ray Train program."""
    import torch  # takes seconds

    from resnet_dist.bench.launch import bench_launch as measure
    from resnet_dist.bench.machine import describe_machine

    gpu = torch.cuda.is_available() if gpu is None else gpu
    out.print(f"machine  {describe_machine(gpu=gpu)}")
    speed = measure(recipe, workers=workers, local=local, gpu=gpu, rounds=rounds)
    where = "in one process" if local else f"{workers} rank(s) under Ray"
    out.print(f"setting  {recipe}, {where}, medians of {rounds} starts of each (lowest to highest)")
    for name, seconds in (("train", speed.ours), ("minimal", speed.minimal)):
        out.print(
            f"{name:<8} {statistics.median(seconds):.2f} s to the first step ({min(seconds):.2f} to {max(seconds):.2f})"
        )
    out.print(f"ratio    {speed.ratio:.3f} ({min(speed.ratios):.3f} to {max(speed.ratios):.3f})")
    for part, length in speed.parts.items():
        out.print(f"         {length:6.2f} s  {part}")


@app.command()
def ui(
    output: Output = DEFAULT_OUTPUT,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Serve the local MLflow store and print the address of the experiment page."""
    from resnet_dist.tracking.ui import serve_store

    raise typer.Exit(serve_store(output, port, out.print))


def _open_mlflow(request, run, on_entry):  # type: ignore[no-untyped-def]
    from resnet_dist.tracking.driver import MlflowTracking

    return MlflowTracking(
        request.output,
        request.recipe,
        name=run.name,
        run_id=run.run_id,
        source=request.source,
        spool=run.spool,
        tags={"resnet_dist.folder": str(run.path), "resnet_dist.attempt": str(run.attempt)},
        on_entry=on_entry,
    )


def _model_folder(model: str, output: Path) -> Path:
    if Path(model).exists():
        return Path(model)
    from mlflow.exceptions import MlflowException

    from resnet_dist.tracking.model import download_model
    from resnet_dist.tracking.run import tracking_uri

    try:
        return download_model(model, tracking_uri(output))
    except MlflowException as error:
        raise UserError(f"{model!r} is neither a folder nor an MLflow run with a model ({error})") from None


def _resume_line(name: str) -> str:
    """The command as it was typed, with the name of its run."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip or word in ("--name", "--resume") or word.startswith("--name="):
            skip = word == "--name"
            continue
        words.append(word)
    return subprocess.list2cmdline(["resnet-dist", *words, "--name", name])


def _short(path: Path | None) -> Path | None:
    return path.relative_to(Path.cwd()) if path and path.is_relative_to(Path.cwd()) else path


def main() -> None:
    """The entry point: a person's mistake is one sentence, a traceback is for our own bugs."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)  # not each table of a new store
    try:
        app()
    except UserError as error:
        err.print(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("interrupted before anything was saved")
        sys.exit(130)
    except RuntimeError as error:
        if type(error).__name__ not in ("TrainingError", "RankFailed"):
            raise
        err.print(f"error: {error}")
        sys.exit(1)
