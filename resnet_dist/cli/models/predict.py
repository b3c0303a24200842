"""The command that predicts the classes of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnet_dist.cli.main import exit_with_message
from resnet_dist.cli.options import (
    DEFAULT_OUTPUT,
    RESUMES,
    STARTS_OVER,
    Address,
    AllowCommands,
    Gpu,
    RayWorkers,
    RunOutput,
    err,
    on_interrupt,
    out,
    use_gpu,
)
from resnet_dist.cli.summary import AllowLeftOut, exit_where_left_out
from resnet_dist.config import DEFAULT_WORKERS
from resnet_dist.data.findings import BAD_IMAGE, BAD_SHARD, Findings
from resnet_dist.errors import UserError
from resnet_dist.system.signals import handle_signals
from resnet_dist.system.streams import has_reader, need_stdout
from resnet_dist.terminal import bars, can_move

if TYPE_CHECKING:
    import torch

    from resnet_dist.predict.classify import Prediction
    from resnet_dist.predict.row_file import RowFile
    from resnet_dist.predict.rows import Write
    from resnet_dist.predict.unread import Input
    from resnet_dist.train.checkpoint.load import TrainedModel

MAX_REPORTED = 20  # bad images that are named on stderr; every row has its own problem in JSON and CSV

Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint, run or exported file by path or URL, a run's name or id, or models:/NAME@ALIAS."
    ),
]
Paths = Annotated[
    list[str],
    typer.Argument(help="Images, folders, patterns, shards, URLs; - is stdin: an image, or paths on lines."),
]


@on_interrupt(STARTS_OVER)
def predict(
    model: Model,
    paths: Paths,
    top: Annotated[int, typer.Option(min=1, metavar="K", help="Classes of each image, the best first.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a heading.")] = False,
    thumbnails: Annotated[
        bool, typer.Option("--thumbnails", help="Show each image in the table, in 24-bit colors.")
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write rows to a .jsonl or .csv; the same command resumes."),
    ] = None,
    workers: RayWorkers = None,
    address: Address = None,
    allow_left_out: AllowLeftOut = False,
    allow_commands: AllowCommands = False,
    gpu: Gpu = None,
    output: RunOutput = str(DEFAULT_OUTPUT),
) -> None:
    """Print the most probable classes of images, a row for each, in the order of the paths.

    Images are decoded, cropped and resized as in `evaluate`. One that cannot be is reported, and its row holds the
    problem in JSON and CSV. Exit code 3: there were such images.
    """
    if as_json + as_csv + (to is not None) > 1:
        raise UserError("--json, --csv and --to exclude each other; use one of them")
    if thumbnails and (as_json or as_csv or to is not None):
        raise UserError("--thumbnails are in the table alone; leave out --json, --csv and --to")
    # The same as in `train`: an exception must not interrupt the imports.
    with handle_signals(exit_with_message(STARTS_OVER)):
        import torch

        from resnet_dist.predict.find import find_model
        from resnet_dist.predict.inputs import inputs_of
        from resnet_dist.predict.row_file import RowFile, form_of_file
        from resnet_dist.predict.rows import writer_of
        from resnet_dist.train.checkpoint.load import load_model

    form = form_of_file(to) if to is not None else "json" if as_json else "csv" if as_csv else "table"
    findings, is_here = Findings(), workers is None and address is None
    device = torch.device("cuda", 0) if is_here and use_gpu(gpu) else torch.device("cpu")
    trained = load_model(find_model(model, output), device, allow_commands=allow_commands)
    heading, write = writer_of(form, trained.classes, top)
    inputs = inputs_of(paths, trained.recipe.data, findings)
    with on_interrupt(STARTS_OVER if to is None else RESUMES), ExitStack() as stack:
        kept = None if to is None else stack.enter_context(RowFile.open(to, trained, top))
        left = inputs if kept is None else kept.rest(inputs, findings)
        place = None if is_here else (workers or DEFAULT_WORKERS, address, gpu)
        made = _predicted(stack, trained, left, device, top, place, thumbnails=thumbnails)
        rows = _counted(made, findings)
        if kept is None:
            _print_rows(rows, heading, write)
        else:
            num_rows = _keep_rows(rows, heading, write, kept)
            _finish(kept, num_rows, findings, allow_left_out=allow_left_out)
    report_findings(findings)
    exit_where_left_out(findings, allow_left_out=allow_left_out, has_strict=False)


def _predicted(
    stack: ExitStack,
    trained: TrainedModel,
    inputs: Iterable[Input],
    device: torch.device,
    top: int,
    place: tuple[int, str | None, bool | None] | None,
    *,
    thumbnails: bool,
) -> Iterator[list[Prediction]]:
    """Return the predictions, made in this process, or on a cluster: place has the workers, the address and --gpu."""
    if place is None:
        from resnet_dist.predict.classify import predictions

        return predictions(trained, inputs, device, top, thumbnails=thumbnails)
    from resnet_dist.predict.cluster import predictions_on

    try:
        from resnet_dist.launch.on_ray.mapped import mapped
        from resnet_dist.launch.on_ray.pool import connected_for
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("ray", "pyarrow"):
            raise  # Ray is installed but broken.
        raise UserError(f"Ray is not installed ({error}); without --workers this process predicts") from None
    workers, address, gpu = place
    placement = stack.enter_context(connected_for(workers, gpu=gpu, address=address, report=err.print))
    on_cluster = partial(mapped, placement=placement, report=err.print)
    return predictions_on(on_cluster, trained, inputs, top, thumbnails=thumbnails, gpu=placement.gpu)


def _print_rows(batches: Iterator[list[Prediction]], heading: str, write: Write) -> None:
    """Print rows as they come, until their reader has left."""
    need_stdout()
    with _progress(hidden=out.file.isatty()) as show:
        done = 0
        while has_reader() and (some := next(batches, None)):
            typer.echo(heading + write(some), file=out.file, nl=False)
            heading, done = "", done + len(some)
            show(done)


def _keep_rows(batches: Iterator[list[Prediction]], heading: str, write: Write, kept: RowFile) -> int:
    """Append rows to a file; return how many it has."""
    done = len(kept.done)
    with _progress(hidden=False) as show:
        for some in batches:
            kept.write((heading if kept.is_new else "") + write(some))
            done += len(some)
            show(done)
    if kept.is_new:
        kept.write(heading)
    return done


def _finish(kept: RowFile, num_rows: int, findings: Findings, *, allow_left_out: bool) -> None:
    """Give a file with all rows its name, but not where a shard is missing that the same command may read later."""
    num_shards = sum(found.kind == BAD_SHARD for found in findings.left_out)
    if num_shards and not allow_left_out:
        shards = "1 shard" if num_shards == 1 else f"{num_shards:,} shards"
        err.print(
            f"{kept.path} is not finished, because {shards} could not be read: the same command tries again from the "
            "first of them on, --allow-left-out leaves them out"
        )
        return
    kept.finish()
    out.print(f"{kept.path}: {num_rows:,} rows")


def _counted(batches: Iterable[list[Prediction]], findings: Findings) -> Iterator[list[Prediction]]:
    """Yield the rows, a batch at a time; record and report the bad ones."""
    num_bad = 0
    for rows in batches:
        for row in rows:
            num_bad += _count(row, findings, is_reported=num_bad < MAX_REPORTED)
        yield rows
    if num_bad > MAX_REPORTED:
        err.print(
            f"and {num_bad - MAX_REPORTED:,} more bad images; --json and --csv have the problem of each"
        )
    if not findings.used and not findings.left_out:
        raise UserError("no images in what the paths name")


def _count(row: Prediction, findings: Findings, *, is_reported: bool) -> bool:
    """Record a row, and report whether it is a bad image; shards are reported at the end."""
    if row.problem is None:
        findings.used += 1
        return False
    if row.problem.startswith(f"{BAD_SHARD}: "):
        findings.leave_out(row.name, BAD_SHARD, row.problem.removeprefix(f"{BAD_SHARD}: "))
        return False
    findings.leave_out(row.name, BAD_IMAGE, row.problem)
    if is_reported:
        err.print(f"bad image {row.name}: {row.problem}")
    return True


def report_findings(findings: Findings, *, bad_images: bool = False) -> None:
    """Report what folders and shards held beside images. bad_images: report these too, which no row has."""
    others = [found for found in findings.left_out if bad_images or found.kind != BAD_IMAGE]
    for found in others[:MAX_REPORTED]:
        err.print(f"left out {found.line()}")
    if len(others) > MAX_REPORTED:
        err.print(f"and {len(others) - MAX_REPORTED:,} more left out")
    for what, kind, count, example in findings.rows():
        if what == "passed over":
            err.print(f"{what}: {count:,} {kind}: {example}{', …' if count > 1 else ''}")


@contextmanager
def _progress(*, hidden: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that shows how many images are done, on a terminal that does not show their rows."""
    if hidden or not can_move(err):
        yield lambda done: None
        return
    with bars(err, ["predict"], "images") as show:
        yield lambda done: show("predict", done, None)
