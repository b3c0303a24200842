"""The commands. Each parses, calls one function, and prints.

Exit codes: 0 done, 2 a mistake in a recipe or flag (nothing was started), 130 interrupted, 1 otherwise.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from resnet_dist.config import UserError, load_recipe
from resnet_dist.terminal import make_reporter

app = typer.Typer(
    help="Distributed training of residual networks.", no_args_is_help=True, pretty_exceptions_enable=False
)
out = Console(soft_wrap=True, highlight=False, markup=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

Output = Annotated[Path, typer.Option(help="Where data, runs and the MLflow store go.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one field.")]
Workers = Annotated[int, typer.Option(min=1, help="DDP ranks.")]
Gpu = Annotated[bool | None, typer.Option("--gpu/--cpu", help="Default: GPUs where there are any.")]
DEFAULT_OUTPUT = Path("output")


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="digits, or a folder of images (class = folder).")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Gets train/ and eval/.")],
    shards: Annotated[int | None, typer.Option(min=1, help="Tars per split.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a data set as shuffled WebDataset shards with an index."""
    from resnet_dist.data.shards import prepare as prepare_source
    from resnet_dist.data.sources import open_source

    def tell(split: str, done: int, total: int) -> None:
        out.print(f"{split}: wrote {done:,} of {total:,}", end="\r" if out.is_terminal else "\n")

    indexes = prepare_source(open_source(source, seed=seed), folder, seed=seed, shards=shards, progress=tell)
    for split, index in indexes.items():
        out.print(f"{split}: {index.num_samples:,} samples in {len(index.shards)} shards, {index.path}")


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
    from resnet_dist.export import load_model
    from resnet_dist.world import World

    index = read_index(shards)
    check_shards(index)
    world = World.single(gpu=torch.cuda.is_available() if gpu is None else gpu)
    trained = load_model(_model_folder(model, output), world.device)
    if trained.classes != index.classes:
        raise UserError(
            f"{index.path} has classes {index.classes}, the model was trained on {trained.classes}"
        )
    for key, value in evaluate_model(trained.model, index, trained.recipe.data, world).items():
        out.print(f"{key:<13} {value:.6g}")


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
