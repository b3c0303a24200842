"""Commands about the runs of an output folder: list, show, compare and browse them; send what is left of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from resnet_dist.cli.main import exit_with_message
from resnet_dist.cli.models.register import candidate_of
from resnet_dist.cli.options import (
    DEFAULT_OUTPUT,
    RESUMES,
    Register,
    RunOutput,
    diverted,
    err,
    on_interrupt,
    out,
    registration_of,
)
from resnet_dist.cli.summary import AsJson, print_json
from resnet_dist.errors import UserError
from resnet_dist.experiments import compare as comparison
from resnet_dist.experiments import details, listing
from resnet_dist.system.signals import handle_signals
from resnet_dist.system.streams import need_stdout, set_end
from resnet_dist.tracking.logged_run import TOP1, LoggedRun, best_first
from resnet_dist.tracking.store import TrackerRefuses

if TYPE_CHECKING:
    from resnet_dist.tracking.mlflow.reading import Tracker
    from resnet_dist.tracking.registration import Registration

NOTHING_CHANGED = "interrupted; nothing was changed"
LIMIT = 50

Experiment = Annotated[str | None, typer.Option(help="Default: that of the newest run.")]
Query = Annotated[
    str | None,
    typer.Option(
        "--filter",
        metavar="QUERY",
        help="In MLflow's syntax, such as 'metrics.`eval/top1` > 0.9 and params.`model.name` = \"resnet20\"'.",
    ),
]
RunName = Annotated[str, typer.Argument(metavar="NAME", help="The name of a run, or its id in MLflow.")]

runs = typer.Typer(invoke_without_command=True, help="List, show and compare runs.")


@runs.callback()
def list_runs(
    context: typer.Context,
    experiment: Experiment = None,
    query: Query = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows; 0: all.")] = LIMIT,
    as_json: AsJson = False,
    output: RunOutput = str(DEFAULT_OUTPUT),
) -> None:
    """List the runs of an experiment, the best first; show one, compare several, or find the best."""
    if context.invoked_subcommand is None:
        _run(_list, experiment, query, limit, as_json, output)


@runs.command()
def show(name: RunName, as_json: AsJson = False, output: RunOutput = str(DEFAULT_OUTPUT)) -> None:
    """Show one run: its recipe, its result, where things are, and its curves."""
    _run(_show, name, as_json, output)


@runs.command()
def best(
    experiment: Experiment = None,
    query: Query = None,
    register: Register = None,
    as_json: AsJson = False,
    output: RunOutput = str(DEFAULT_OUTPUT),
) -> None:
    """Show the run of an experiment with the highest top-1 on its evaluation set, and register its model."""
    _run(_best, experiment, query, registration_of(register), as_json, output)


@runs.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="NAME NAME …", help="Runs, by name or id.")],
    as_json: AsJson = False,
    output: RunOutput = str(DEFAULT_OUTPUT),
) -> None:
    """Compare runs: the recipe fields that differ, their metrics side by side, and their curves."""
    _run(_compare, names, as_json, output)


@on_interrupt(NOTHING_CHANGED)
def ui(
    output: RunOutput = str(DEFAULT_OUTPUT),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: 5000, or a free one where it is in use.")
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="Open the page of this run alone.")] = None,
) -> None:
    """Serve the local MLflow store and print the address of the experiment page; of a server, print its page."""
    tracker = _open(output)
    from resnet_dist.tracking.mlflow.browse.serve import show_runs

    code = show_runs(tracker, port, run, out.print)
    # The server's own lines matter where it could not serve.
    set_end("tail" if code else "silent")
    raise typer.Exit(code)


@on_interrupt(RESUMES)
def sync(
    name: Annotated[
        str | None, typer.Argument(help="A run or a study; default: all of the output folder.")
    ] = None,
    output: RunOutput = str(DEFAULT_OUTPUT),
) -> None:
    """Send what MLflow did not get of a run or a study, and close what a driver that died left open there."""
    # The same as in `train`: an exception must not interrupt the imports.
    with handle_signals(exit_with_message(RESUMES)):
        from resnet_dist.runs.storage.open import resolved
        from resnet_dist.tracking.sync import sync_runs

    if not sync_runs(resolved(output), name, out.print):
        raise typer.Exit(1)


def _run(command: Callable[..., None], *arguments: object) -> None:
    diverted(on_interrupt(NOTHING_CHANGED)(command))(*arguments)


def _list(experiment: str | None, query: str | None, limit: int, as_json: bool, output: str) -> None:
    tracker = _open(output)
    opened, found, has_more = _selected(tracker, experiment, query, limit or None)
    if as_json:
        listed = [listing.run_json(run) for run in best_first(found)]
        print_json({"experiment": opened, "runs": listed, "more": has_more})
        return
    names = [other.name for other in tracker.experiments()]
    others = ", ".join(name for name in names if name not in (opened, "Default"))
    out.print(f"experiment {opened}, {tracker.place}" + (f"; others: {others}" if others else ""))
    for line in listing.table(found):
        out.print(line)
    if has_more:
        out.print(f"the best {limit} of the experiment; --limit 0 lists all")


def _show(name: str, as_json: bool, output: str) -> None:
    tracker = _open(output)
    _print_run(tracker, tracker.find(name), as_json=as_json)


def _best(
    experiment: str | None, query: str | None, registration: Registration | None, as_json: bool, output: str
) -> None:
    tracker = _open(output)
    opened, found, _ = _selected(tracker, experiment, query, 1)
    if TOP1 not in found[0].metrics:
        raise UserError(f"no run of experiment {opened} has been evaluated yet: none is the best")
    best, candidate = found[0], None
    if registration is not None:
        candidate = candidate_of(best.run_id, output, registration)
    _print_run(tracker, best, as_json=as_json)
    if candidate is not None:
        # With --json, stdout has one object.
        (err if as_json else out).print(f"registered as {candidate.register()}")


def _compare(names: list[str], as_json: bool, output: str) -> None:
    if len(set(names)) < 2:
        raise UserError(
            f"{names[0]}: one run cannot be compared; name two or more, or use `resnet-dist runs show`"
        )
    tracker = _open(output)
    by_id = {run.run_id: run for run in map(tracker.find, dict.fromkeys(names))}
    found = list(by_id.values())
    if len(found) < 2:
        raise UserError(f"{' and '.join(names)} are the same run, {found[0].name}; name two or more")
    need_stdout()
    if as_json:
        print_json(comparison.comparison_json(found))
        return
    for line in comparison.side_by_side(found):
        out.print(line)
    histories = {key: [tracker.history(run, key) for run in found] for key in details.CURVES}
    for line in comparison.curves(found, histories, plain=_is_plain()):
        out.print(line)


def _print_run(tracker: Tracker, run: LoggedRun, *, as_json: bool) -> None:
    need_stdout()
    histories = {key: tracker.history(run, key) for key in details.CURVES if key in run.metrics}
    if as_json:
        curves = {key: [[point.step, point.value] for point in points] for key, points in histories.items()}
        print_json({**listing.run_json(run), "curves": curves})
        return
    others = tracker.runs([tracker.experiment(run.experiment)], limit=LIMIT)
    for line in details.describe(run, others, tracker.place, tracker.page_of(run)):
        out.print(line)
    for line in details.curves(histories, plain=_is_plain()):
        out.print(line)


def _selected(
    tracker: Tracker, experiment: str | None, query: str | None, limit: int | None
) -> tuple[str, list[LoggedRun], bool]:
    """Return the name of the experiment, the best of its runs that a query selects, and whether there are more.

    Raises UserError where there is none.
    """
    opened = tracker.experiment(experiment)
    try:
        found = _trained(lambda count: tracker.runs([opened], query or "", count), limit)
    except TrackerRefuses:
        raise
    except UserError as error:
        raise UserError(f"--filter {query!r}: {error}" if query else str(error)) from None
    need_stdout()
    if not found:
        which = f" that --filter {query!r} selects" if query else ""
        raise UserError(f"experiment {opened.name} has no runs{which}")
    return opened.name, found[:limit], limit is not None and len(found) > limit


def _trained(ask: Callable[[int | None], list[LoggedRun]], limit: int | None) -> list[LoggedRun]:
    """Return the best runs but those of studies, which train nothing: one more than the limit, where there are more.

    ask: returns the best so many of all; None: all.
    """
    asked = None if limit is None else limit + 1
    while True:
        found = ask(asked)
        trained = [run for run in found if not run.is_group_run]
        if asked is None or limit is None or len(found) < asked or len(trained) > limit:
            return trained
        asked = None  # Studies have taken the places of runs.


def _open(output: str) -> Tracker:
    """Open the tracker, and close there what drivers that died left RUNNING."""
    # An exception must not interrupt the imports, as in `train`.
    with handle_signals(exit_with_message(NOTHING_CHANGED)):
        from resnet_dist.runs.storage.open import resolved
        from resnet_dist.tracking.abandoned import close_abandoned
        from resnet_dist.tracking.open import has_mlflow
        from resnet_dist.tracking.store import check_tracking_uri, store_folder

        if not has_mlflow():
            raise UserError("MLflow, which keeps the runs that this command reads, is not installed")
        from resnet_dist.tracking.mlflow.reading import Tracker

    place = resolved(output)
    check_tracking_uri()
    tracker = Tracker.open(store_folder(place))
    close_abandoned(tracker, place, err.print)
    return tracker


def _is_plain() -> bool:
    """Report whether the terminal shows no blocks."""
    return not out.encoding.startswith("utf")
