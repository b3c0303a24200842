"""The command that evaluates a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from resnet_dist.cli.main import exit_with_message
from resnet_dist.cli.models.predict import Model
from resnet_dist.cli.models.register import candidate_of
from resnet_dist.cli.options import (
    DEFAULT_OUTPUT,
    STARTS_OVER,
    Address,
    AllowCommands,
    Gpu,
    RayWorkers,
    Register,
    RunOutput,
    err,
    on_interrupt,
    out,
    registration_of,
    use_gpu,
)
from resnet_dist.config import DEFAULT_WORKERS
from resnet_dist.errors import UNSENT_EXIT_CODE, UserError
from resnet_dist.system.signals import handle_signals
from resnet_dist.system.streams import need_stdout
from resnet_dist.terminal import bars, can_move

if TYPE_CHECKING:
    from resnet_dist.data.shards.index import Index
    from resnet_dist.evaluation.job import EvaluationTask
    from resnet_dist.evaluation.run import Result


@on_interrupt(STARTS_OVER)
def evaluate(
    model: Model,
    shards: Annotated[str, typer.Argument(help="A folder with an index.json.")],
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="Arithmetic of the forward passes; default: the recipe's."),
    ] = None,
    robust: Annotated[
        bool, typer.Option("--robust", help="Also under 14 corruptions in 5 severities: 70 times the work.")
    ] = False,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write numbers, confusions, classes, calibration."),
    ] = None,
    log_name: Annotated[
        str | None,
        typer.Option("--log", metavar="NAME", help="Log as NAME/top1 … to the model's run in MLflow."),
    ] = None,
    workers: RayWorkers = None,
    address: Address = None,
    register: Register = None,
    allow_commands: AllowCommands = False,
    gpu: Gpu = None,
    output: RunOutput = str(DEFAULT_OUTPUT),
) -> None:
    """Measure top-1, top-5 and loss of a trained model, with every sample counted once, in one process or in many."""
    need_stdout()
    registration = registration_of(register)
    # The same as in `train`: an exception must not interrupt the imports.
    with handle_signals(exit_with_message(STARTS_OVER)):
        from resnet_dist.data.batches.bad_samples import check_bad_fraction
        from resnet_dist.evaluation.report import check_folder, files_of, write_folder

    if out_folder is not None:
        check_folder(out_folder)
    is_here, keeps = workers is None and address is None, out_folder is not None or log_name is not None
    gpu = use_gpu(gpu) if is_here else gpu
    job, index = _job(model, shards, output, precision, robust=robust, keeps=keeps, commands=allow_commands)
    candidate = candidate_of(model, output, registration, job.trained.step)
    send = None if log_name is None else _sender(model, job, index, log_name, output)
    if is_here:
        result = _evaluated_here(job, index, gpu, precision, shards)
    else:
        result = _evaluated_on_ray(job, index, gpu, workers or DEFAULT_WORKERS, address, precision, shards)
    check_bad_fraction(
        index.location, result.bad, index.num_samples, job.trained.recipe.data.max_bad_fraction
    )
    _print(result, index)
    files = files_of(job, result) if keeps else {}
    if out_folder is not None:
        write_folder(out_folder, files)
        out.print(f"written to {out_folder}")
    is_sent = send is None or send(result, files)
    if candidate is not None:  # Last: whatever it raises, the result is kept.
        out.print(f"registered as {candidate.register()}")
    if not is_sent:
        raise typer.Exit(UNSENT_EXIT_CODE)


def _job(
    model: str,
    shards: str,
    output: str,
    precision: Literal["fp32", "bf16", "fp16"] | None,
    *,
    robust: bool,
    keeps: bool,
    commands: bool,
) -> tuple[EvaluationTask, Index]:
    """Return what is to be evaluated. Raises UserError where the shards do not suit the model."""
    import torch

    from resnet_dist.data.shards.index import check_shards, read_index
    from resnet_dist.data.shards.labels import class_difference
    from resnet_dist.data.storage.urls import is_local, local_path
    from resnet_dist.evaluation.job import EvaluationTask
    from resnet_dist.evaluation.robust import ALL_CONDITIONS
    from resnet_dist.predict.find import find_model
    from resnet_dist.train.checkpoint.load import load_model
    from resnet_dist.train.predictions import MAX_SAMPLES

    index = read_index(shards)
    check_shards(index)
    trained = load_model(find_model(model, output), torch.device("cpu"), allow_commands=commands)
    if difference := class_difference(index.classes, trained.classes):
        raise UserError(
            f"{index.location} has other classes than the model was trained on: {difference}; index the shards with "
            "--classes and the index of the training set"
        )
    if keeps and index.num_samples > MAX_SAMPLES:
        err.print(
            f"no figures of {index.num_samples:,} samples: at most {MAX_SAMPLES:,} predictions are kept"
        )
        keeps = False
    # Workers run in other folders.
    place = str(local_path(shards).absolute()) if is_local(shards) else shards
    conditions = ALL_CONDITIONS if robust else ()
    return EvaluationTask(
        trained, place, precision or trained.recipe.train.precision, conditions, keeps
    ), index


def _evaluated_here(
    job: EvaluationTask, index: Index, gpu: bool | None, asked: str | None, shards: str
) -> Result:
    from resnet_dist.evaluation.run import evaluate_here

    job = _on_device(job, asked, gpu=use_gpu(gpu))
    with _progress(index, job) as show:
        return evaluate_here(job, index, show or (lambda done: None), partial(_report_bad, shards=shards))


def _evaluated_on_ray(
    job: EvaluationTask,
    index: Index,
    gpu: bool | None,
    workers: int,
    address: str | None,
    asked: str | None,
    shards: str,
) -> Result:
    """Evaluate in shares on a cluster: every number of workers has the same samples in the same forward passes."""
    from resnet_dist.evaluation.job import evaluate_share
    from resnet_dist.evaluation.run import cut, join
    from resnet_dist.train.evaluate import evaluation_order

    try:
        from resnet_dist.launch.on_ray.pool import worker_pool
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise  # Ray is installed but broken.
        raise UserError(f"Ray is not installed ({error}); without --workers this process evaluates") from None
    num_steps = evaluation_order(index, job.trained.recipe.data).steps_per_epoch
    parts = cut(num_steps, workers)
    if len(parts) < workers:
        err.print(f"--workers {workers}: {len(parts)} are enough for the {num_steps} steps of this set")
    with worker_pool(len(parts), gpu=gpu, address=address, report=err.print) as pool:
        job = _on_device(job, asked, gpu=pool.gpu)
        with _progress(index, job) as show:
            shares = pool.map(evaluate_share, job, parts, show)
        return join(job, index, shares, partial(_report_bad, shards=shards))


def _on_device(job: EvaluationTask, asked: str | None, *, gpu: bool) -> EvaluationTask:
    """Return the job with a precision that the device has; where it is not the recipe's, that is reported."""
    import torch

    from resnet_dist.train.device import chosen_precision

    device = torch.device("cuda" if gpu else "cpu")
    precision, line = chosen_precision(asked, job.trained.recipe.train.precision, device)  # type: ignore[arg-type]
    if line is not None:
        err.print(line)
    return replace(job, precision=precision, gpu=gpu)


@contextmanager
def _progress(index: Index, job: EvaluationTask) -> Iterator[Callable[[int], None] | None]:
    """Yield a function that shows on a terminal how many steps are done; None where there is no terminal."""
    if not can_move(err):
        yield None
        return
    size = job.trained.recipe.data.global_batch_size
    with bars(err, ["evaluate"], "images") as show:
        yield lambda steps: show("evaluate", min(steps * size, index.num_samples), index.num_samples)
        # The last steps are not counted before the work ends, and never where it fails.
        show("evaluate", index.num_samples, index.num_samples)


def _report_bad(bad: list[str], shards: str) -> None:
    from resnet_dist.train.watch.guards import MAX_LISTED

    for text in bad[:MAX_LISTED]:
        err.print(f"bad sample {text}")
    if len(bad) > MAX_LISTED:
        err.print(f"and {len(bad) - MAX_LISTED:,} more; `resnet-dist index {shards} --verify` lists all")


def _print(result: Result, index: Index) -> None:
    from resnet_dist.data.images.corruptions.table import DIFFERENCES
    from resnet_dist.evaluation.robust import robust_table

    for key, value in result.metrics.items():
        if not key.startswith("robust/"):
            out.print(f"{f'eval/{key}':<13} {value:.6g}")
    if result.top1:
        out.print(f"\n{robust_table(result.top1)}\n({DIFFERENCES})")
    if result.bad:
        err.print(
            f"{len(result.bad):,} of {index.num_samples:,} samples are bad and not counted in the metrics"
        )


def _sender(
    model: str, job: EvaluationTask, index: Index, name: str, output: str
) -> Callable[[Result, dict[str, bytes]], bool]:
    """Find the run to log to, before anything is computed; return what logs a result to it, and reports whether it could.

    Raises UserError where the model belongs to no run.
    """
    from resnet_dist.data.storage.urls import shown
    from resnet_dist.tracking.open import check_tracker, has_mlflow
    from resnet_dist.tracking.store import store_folder

    if not has_mlflow():
        raise UserError(f"--log {name}: MLflow is not installed")
    store = store_folder(output)
    check_tracker(store, "")
    from resnet_dist.tracking.mlflow.page.evaluations import EvaluatedModel, check_name

    check_name(name)
    found = EvaluatedModel.find(model, job.trained.location, job.trained.step, Path(store))

    def send(result: Result, files: dict[str, bytes]) -> bool:
        try:
            found.log(name, result.metrics, files, shown(index.location))
        except Exception as error:  # A server may fail in any way; the result is printed already.
            err.print(f"{found.run.place} did not get the evaluation: {error}")
            return False
        link = "linked to its model" if found.model_id else "which has no logged model of this step"
        out.print(f"logged as {name}/… to run {found.run.run_id}, {link}")
        return True

    return send
