"""The command that runs a sweep."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnet_dist.cli.main import check_machine, check_single_start, exit_with_message
from resnet_dist.cli.options import (
    DEFAULT_OUTPUT,
    RESUMES,
    AlsoTo,
    Gpu,
    MaxRestarts,
    Output,
    Overrides,
    err,
    local_folder,
    on_interrupt,
    out,
)
from resnet_dist.cli.training.ending import (
    NOTHING_SAVED,
    browse_line,
    exit_where_left,
    report_unsent,
    short_path,
)
from resnet_dist.config import DEFAULT_MAX_RESTARTS, load_recipe
from resnet_dist.errors import UserError
from resnet_dist.sweep.search import check_scheduler, read_searches
from resnet_dist.system.command import command_line
from resnet_dist.system.signals import handle_signals
from resnet_dist.system.streams import shown
from resnet_dist.terminal import make_reporter
from resnet_dist.tracking.also.choose import check_also

if TYPE_CHECKING:
    from resnet_dist.sweep.report import SweepSummary
    from resnet_dist.sweep.request import SweepRequest


class Schedulers(StrEnum):
    none = "none"
    asha = "asha"


Searches = Annotated[
    list[str] | None,
    typer.Option(
        "--search",
        metavar="FIELD=VALUES",
        help="Values of one field: log:0.01..1, 0.5..0.99, int:1..4 or a,b,c. Repeat it for more fields.",
    ),
]
NumTrials = Annotated[int, typer.Option(min=1, help="Number of trials.")]
Scheduling = Annotated[
    Schedulers, typer.Option(help="asha stops trials early that are not among the best third.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the values that are drawn.")]
TrialWorkers = Annotated[int, typer.Option(min=1, help="DDP ranks of each trial.")]
Local = Annotated[bool, typer.Option("--local", help="One rank a trial, in the trial's own process.")]
Concurrent = Annotated[
    int | None,
    typer.Option(min=1, help="Trials at the same time; default: as many as there are GPUs, or CPUs."),
]


@on_interrupt(RESUMES)
def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.py")],
    search: Searches = None,
    trials: NumTrials = 8,
    overrides: Overrides = None,
    scheduler: Scheduling = Schedulers.none,
    seed: Seed = 0,
    workers: TrialWorkers = 1,
    local: Local = False,
    concurrent: Concurrent = None,
    gpu: Gpu = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep; an existing one is continued.")] = None,
    output: Output = DEFAULT_OUTPUT,
    max_restarts: MaxRestarts = DEFAULT_MAX_RESTARTS,
    also: AlsoTo = None,
) -> None:
    """Train a recipe with other values of some fields, and find the best; the same command continues it."""
    check_single_start(address)
    if local and workers > 1:
        raise UserError(f"--workers {workers}: --local trains each trial as one rank; leave one of them out")
    check_machine(local=False, address=address, workers=workers * (concurrent or 1), gpu=gpu)
    others = check_also(also or ())
    folder = local_folder(str(output), "--output").absolute()
    from resnet_dist.launch.ray_cluster.check import find_cluster  # Here, because `--help` needs none.

    with shown():
        of_file = load_recipe(recipe)
    value = of_file.with_overrides(overrides or ())
    texts = tuple(search or ())
    searches = read_searches(texts, value, overrides or ())
    check_scheduler(scheduler.value, value)
    find_cluster(address)
    with handle_signals(exit_with_message(NOTHING_SAVED)):  # The same as in `train`.
        from resnet_dist.sweep.request import SweepRequest

    request = SweepRequest(
        value,
        of_file,
        str(recipe),
        folder,
        texts,
        searches,
        trials,
        tuple(overrides or ()),
        seed,
        scheduler.value,
        workers,
        concurrent,
        gpu,
        address,
        name,
        max_restarts,
        others,
    )
    _run(request, output)


def _run(request: SweepRequest, output: Path) -> None:
    """Run a sweep, print its results, and exit with the code for them."""
    with handle_signals(exit_with_message(NOTHING_SAVED)):
        from resnet_dist.driver.output import check_place
        from resnet_dist.sweep.run import SweepInterrupted, run_sweep
        from resnet_dist.tracking.abandoned import closing_beside_group
        from resnet_dist.tracking.open import check_tracker, open_group

    check_place(request.output)
    check_tracker(request.output, request.experiment)
    with make_reporter(out, training_lines=False, bar=False) as reporter:
        try:
            summary = run_sweep(request, reporter, closing_beside_group(open_group))
        except SweepInterrupted as interrupted:
            err.print(
                f"interrupted after {interrupted.num_results} of {interrupted.num_trials} trials; this continues it:\n"
                f"  {command_line()}"
            )
            raise typer.Exit(interrupted.exit_code) from None
    _print(summary, request, output)
    _exit_where_trials_are_left(summary)
    not_evaluated = [f"{trial.name} {trial.not_evaluated}" for trial in summary.not_evaluated]
    exit_where_left(not_evaluated, summary.runs, (request.folder, summary.unsent))


def _print(summary: SweepSummary, request: SweepRequest, output: Path) -> None:
    from resnet_dist.sweep.report import table_lines
    from resnet_dist.sweep.run import command_of

    out.print("\n".join(table_lines(summary.plan)))
    best = summary.plan.best()
    out.print(
        f"{summary.conclusion}\n"
        + ("" if best is None else f"best       {command_of(request, best.sets)}\n")
        + f"figure     {short_path(summary.figure)}\n"
        f"table      {short_path(summary.table)}{browse_line(output, request.experiment)}"
    )


def _exit_where_trials_are_left(summary: SweepSummary) -> None:
    """End the command with 1 where a trial has no result: the same command tries it again."""
    left = summary.left
    if not left:
        return
    # What MLflow did not get of the sweep itself was reported at its end.
    report_unsent(summary.runs, code=1)
    for trial in left:
        reason = trial.outcome.reason if trial.outcome is not None else ""
        err.print(f"error: trial {trial.name} {trial.state}{': ' if reason else ''}{reason}")
    err.print(
        f"{len(left)} of {len(summary.plan.trials)} trials have no result; once that is mended, this tries them "
        f"again:\n  {command_line()}"
    )
    raise typer.Exit(1)
