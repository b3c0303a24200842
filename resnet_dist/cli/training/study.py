"""The command that trains the runs of a study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnet_dist.cli.main import check_machine, check_single_start, exit_with_message
from resnet_dist.cli.options import (
    DEFAULT_OUTPUT,
    RESUMES,
    AlsoTo,
    Gpu,
    Output,
    err,
    local_folder,
    on_interrupt,
    out,
)
from resnet_dist.cli.training.ending import NOTHING_SAVED, browse_line, exit_where_left, short_path
from resnet_dist.config import Study, load_study
from resnet_dist.system.command import command_line
from resnet_dist.system.signals import handle_signals
from resnet_dist.system.streams import shown
from resnet_dist.terminal import make_reporter
from resnet_dist.tracking.also.choose import check_also

if TYPE_CHECKING:
    from resnet_dist.study.report import StudySummary


@on_interrupt(RESUMES)
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
    name: Annotated[
        str | None, typer.Option(help="Name of the study; an existing study is continued.")
    ] = None,
    output: Output = DEFAULT_OUTPUT,
    also: AlsoTo = None,
) -> None:
    """Train the runs of a study one after another and draw its figure; the same command continues it."""
    check_single_start(address)
    check_machine(local=workers is None, address=address, workers=workers, gpu=gpu)
    others = check_also(also or ())
    with shown():
        value = load_study(job, arguments or (), overrides or ())
    if address is not None or workers is not None:
        from resnet_dist.launch.ray_cluster.check import find_cluster

        find_cluster(address)
    with handle_signals(exit_with_message(NOTHING_SAVED)):  # The same as in `train`.
        from resnet_dist.driver.output import check_place
        from resnet_dist.study.request import StudyRequest
        from resnet_dist.study.run import StudyInterrupted, run_study
        from resnet_dist.tracking.abandoned import closing_abandoned
        from resnet_dist.tracking.also.fan_out import with_others
        from resnet_dist.tracking.open import check_tracker, open_group, open_publisher

    folder = local_folder(str(output), "--output").absolute()
    check_place(folder)
    check_tracker(folder, value.experiment)
    request = StudyRequest(value, str(job), folder, workers, gpu, address, name, others)
    publisher = with_others(closing_abandoned(open_publisher))
    with make_reporter(out, training_lines=False) as reporter:
        try:
            summary = run_study(request, reporter, open_group, publisher)
        except StudyInterrupted as interrupted:
            err.print(
                f"interrupted after {interrupted.finished} of {len(value.trials)} runs; this continues it:\n"
                f"  {command_line()}"
            )
            raise typer.Exit(interrupted.exit_code) from None
    _print_results(value, summary, output)
    exit_where_left(summary.not_evaluated, summary.runs, (request.folder, summary.unsent))


def _print_results(value: Study, summary: StudySummary, output: Path) -> None:
    for trial, result in zip(value.trials, summary.results, strict=True):
        metrics = result.metrics
        top1 = f"{metrics['eval/top1']:.2%}" if "eval/top1" in metrics else "-"
        out.print(
            f"{trial.name:<24} training loss {metrics['train/loss']:.4f}  top-1 {metrics['train/top1']:.2%}  "
            f"eval top-1 {top1}"
        )
    out.print(
        f"(training: means over the last {value.last_steps} steps)\n{summary.conclusion}\n"
        f"figure     {short_path(summary.figure)}\n"
        f"table      {short_path(summary.table)}{browse_line(output, value.experiment)}"
    )
