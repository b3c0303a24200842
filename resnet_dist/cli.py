"""The commands. Each parses, calls one function, and prints.

Exit codes: 0 done, 2 a mistake in a recipe or flag (nothing was started), 130 interrupted, 1 otherwise.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import statistics
import sys
import threading
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console

from resnet_dist.config import Data, UserError, load_recipe, load_study
from resnet_dist.config.part import explain
from resnet_dist.cpus import cpu_count
from resnet_dist.interrupts import interrupt, signals_call
from resnet_dist.launcher import TRAINING_THREAD, is_main_process, started_by_torchrun
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
Workers = Annotated[int | None, typer.Option(min=1, help="DDP ranks; default: 2.")]
Gpu = Annotated[bool | None, typer.Option("--gpu/--cpu", help="Default: GPUs where there are any.")]
DEFAULT_OUTPUT = Path("output")
DEFAULT_SHARD_CACHE = Path(Data.model_fields["shard_cache"].default)
SHARD_CACHE_BYTES: int = Data.model_fields["shard_cache_bytes"].default
FETCH_TIMEOUT_SECONDS: float = Data.model_fields["fetch_timeout_seconds"].default
Split = Literal["train", "eval"]
Crop = Literal["none", "pad-crop", "random-resized-crop"]
Cache = Literal["none", "ram", "device"]
Against = Literal["raw"]
NOTHING_SAVED = "interrupted before training began; the same command begins it"
COMMAND_VARIABLE = "RESNET_DIST_COMMAND"  # of a submitted job: as the person typed it
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
    workers = workers or (1 if samples < FEW_SAMPLES else cpu_count())
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
    from resnet_dist.data.indexing import build_index, compressed, verify_index
    from resnet_dist.data.naming import class_names, default_location, expand
    from resnet_dist.data.remote import exists
    from resnet_dist.data.storage import Limits

    limits = Limits(shard_cache.expanduser(), SHARD_CACHE_BYTES, FETCH_TIMEOUT_SECONDS, allow_commands)
    workers = workers or cpu_count()
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
    workers: Workers = None,
    gpu: Gpu = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; default: one here.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the run; one that exists is continued.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest run of this recipe.")] = False,
    output: Output = DEFAULT_OUTPUT,
) -> None:
    """Train a recipe to its end, or from where its run stopped."""
    value = None if started_by_torchrun() else load_recipe(recipe, overrides or ())
    # Nothing has begun, and an exception in the middle of numpy's or torch's import leaves wreckage.
    with signals_call(_leave_interrupted):
        from resnet_dist.driver import Interrupted, Request, run_training  # torch takes seconds to import

        ranks = _torchrun_ranks()
    if ranks is not None and ranks.rank > 0:
        raise typer.Exit(ranks.follow())
    try:
        with ranks or nullcontext(), make_reporter(out) as reporter:
            value = value or load_recipe(recipe, overrides or ())  # a mistake in it is for all ranks
            place = output.absolute()
            request = Request(value, str(recipe), place, workers, gpu, local, address, name, resume, ranks)
            summary = run_training(request, reporter, _open_tracking({}))
    except Interrupted as interrupted:
        where = f" at step {interrupted.step}" if interrupted.step is not None else ""
        err.print(f"interrupted{where}; this continues it:\n  {_resume_line(interrupted.run.name)}")
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        err.print(NOTHING_SAVED)
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
def study(
    job: Annotated[Path, typer.Argument(metavar="JOB.py", help="Defines study().")],
    arguments: Annotated[
        list[str] | None, typer.Option("--with", metavar="NAME=VALUE", help="An argument of study().")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one field of every recipe.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="DDP ranks of each run, on Ray; default: one, in this process.")
    ] = None,
    gpu: Gpu = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the study; one that exists is continued.")] = None,
    output: Output = DEFAULT_OUTPUT,
) -> None:
    """Train the runs of a study one after another, draw what they say; the same command continues one."""
    value = load_study(job, arguments or (), overrides or ())
    from resnet_dist.study import StudyInterrupted, StudyRequest, run_study  # torch takes seconds to import

    request = StudyRequest(value, str(job), output.absolute(), workers, gpu, address, name)
    with make_reporter(out, training_lines=False) as reporter:
        try:
            summary = run_study(request, reporter, _open_mlflow_study, _open_tracking)
        except StudyInterrupted as interrupted:
            err.print(
                f"interrupted after {interrupted.finished} of {len(value.trials)} runs; this continues it:\n"
                f"  {shlex.join(['resnet-dist', *sys.argv[1:]])}"
            )
            raise typer.Exit(130) from None
    for trial, result in zip(value.trials, summary.results, strict=True):
        metrics = result.metrics
        out.print(
            f"{trial.name:<24} training loss {metrics['train/loss']:.4f}  top-1 {metrics['train/top1']:.2%}  "
            f"eval top-1 {metrics['eval/top1']:.2%}"
        )
    out.print(
        f"(training: means over the last {value.last_steps} steps)\n{summary.conclusion}\n"
        f"figure     {_short(summary.figure)}\n"
        f"table      {_short(summary.table)}\n"
        f"browse     resnet-dist ui{'' if output == DEFAULT_OUTPUT else f' --output {output}'}"
    )


@app.command()
def submit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.py")],
    address: Annotated[str, typer.Option(help="The cluster's dashboard, such as http://127.0.0.1:8265.")],
    overrides: Overrides = None,
    workers: Workers = None,
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

    submission = Submission(
        value, recipe, address, workers or 2, gpu, name, resume, output.absolute(), detach, _command_line()
    )
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

    try:
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
    except ValidationError as error:
        raise UserError(explain(error, Data)) from None
    workers = loader_workers or cpu_count()
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
    out.print(f"loss     {speed.our_loss:.6f}, bare {speed.bare_loss:.6f}, over the same first {steps} steps")
    if not speed.same_work:
        err.print("error: the loops do not do the same work: their losses differ")
        raise typer.Exit(1)


@bench.command("launch")
def bench_launch(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.py")] = Path("jobs/digits.py"),
    workers: Workers = None,
    local: Annotated[bool, typer.Option("--local", help="Without Ray, against plain PyTorch.")] = False,
    gpu: Gpu = None,
    rounds: Annotated[int, typer.Option(min=1, help="Starts of each.")] = 5,
) -> None:
    """Seconds from the command to the first step of `train`, against a minimal Ray Train program."""
    import torch  # takes seconds

    from resnet_dist.bench.launch import bench_launch as measure
    from resnet_dist.bench.machine import describe_machine

    gpu, workers = torch.cuda.is_available() if gpu is None else gpu, workers or 2
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


def _leave_interrupted(count: int = 1) -> NoReturn:
    if is_main_process():
        err.print(NOTHING_SAVED)
    sys.stdout.flush()
    os._exit(130)


def _torchrun_ranks():  # type: ignore[no-untyped-def]
    """The ranks that torchrun has started; None where this process is on its own."""
    if not started_by_torchrun():
        return None
    from resnet_dist.torchrun import Ranks

    return Ranks()


def _open_tracking(more_tags):  # type: ignore[no-untyped-def]
    """How to open the tracker of a run, which gets these tags too."""

    def open_tracking(request, run, on_entry):  # type: ignore[no-untyped-def]
        try:
            from resnet_dist.tracking.driver import MlflowTracking
        except ImportError:
            from resnet_dist.tracking.plain import PlainTracking

            out.print(f"MLflow is not installed: metrics go to {_short(run.spool)} alone")
            return PlainTracking(run.spool, on_entry)
        return MlflowTracking(
            request.output,
            request.recipe,
            name=run.name,
            run_id=run.run_id,
            key=run.key,
            source=request.source,
            spool=run.spool,
            tags={
                "resnet_dist.folder": str(run.path),
                "resnet_dist.attempt": str(run.attempt),
                **more_tags,
            },
            on_entry=on_entry,
        )

    return open_tracking


def _open_mlflow_study(request):  # type: ignore[no-untyped-def]
    from resnet_dist.tracking.study import MlflowStudy

    return MlflowStudy(
        request.output,
        request.folder,
        experiment=request.study.experiment,
        name=request.full_name,
        source=request.source,
        description=request.study.description,
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
    for word in shlex.split(os.environ.get(COMMAND_VARIABLE) or _command_line()):
        if skip or word in ("--name", "--resume") or word.startswith("--name="):
            skip = word == "--name"
            continue
        words.append(word)
    return shlex.join([*words, "--name", name])


def _command_line() -> str:
    if not started_by_torchrun():
        return shlex.join(["resnet-dist", *sys.argv[1:]])
    ranks = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    return shlex.join(["torchrun", "--nproc-per-node", ranks, "-m", "resnet_dist", *sys.argv[1:]])


def _short(path: Path | None) -> Path | None:
    return path.relative_to(Path.cwd()) if path and path.is_relative_to(Path.cwd()) else path


def main() -> None:
    """The entry point: a person's mistake is one sentence, a traceback is for our own bugs."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)  # not each table of a new store
    with signals_call(interrupt):  # a job that is stopped gets SIGTERM: the same as Ctrl-C
        _leave(_run())


def _run() -> int:
    """Run the command; its exit code."""
    speaks = is_main_process()
    try:
        if speaks:
            app()
        return int(app(standalone_mode=False) or 0)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except UserError as error:
        if speaks:
            err.print(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        if speaks:
            err.print("interrupted before anything was saved")
        return 130
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    """Print what ended a run; the exit code."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # importing them would import torch
    if "AlreadySaid" in kinds:
        return 1
    if kinds & {"TrainingError", "RankFailed", "StorageError"}:
        err.print(f"error: {error}")
        return 1
    if not is_main_process() and isinstance(code := getattr(error, "exit_code", None), int):
        return code  # a mistake in the flags, which rank 0 explains
    traceback.print_exception(error)
    return 1


def _leave(code: int) -> NoReturn:
    """End the process; at once where a training thread may hang in a collective for ever."""
    if any(thread.name == TRAINING_THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
