"""Commands that train one recipe, or all recipes of a study."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnet_dist.cli.main import check_machine, check_single_start, exit_with_message
from resnet_dist.cli.options import (
    DEFAULT_OUTPUT,
    RESUMES,
    Address,
    AlsoTo,
    BeginFrom,
    Gpu,
    MaxRestarts,
    Name,
    Output,
    Overrides,
    Profile,
    Register,
    RunOutput,
    Wait,
    Workers,
    err,
    local_folder,
    on_interrupt,
    out,
    registration_of,
)
from resnet_dist.config import (
    DEFAULT_MAX_RESTARTS,
    Recipe,
    Study,
    load_recipe,
    load_study,
)
from resnet_dist.data.findings import LEFT_OUT
from resnet_dist.errors import INTERRUPTED_EXIT_CODE, UNSENT_EXIT_CODE
from resnet_dist.system.command import (
    command_line,
    quoted,
    resume_advice,
    started_by_torchrun,
)
from resnet_dist.system.signals import handle_signals
from resnet_dist.system.streams import shown
from resnet_dist.terminal import make_reporter
from resnet_dist.tracking.also.choose import check_also
from resnet_dist.tracking.origin import changes_text
from resnet_dist.tracking.store import (
    URI_VARIABLE,
    check_tracking_uri,
    has_password,
    is_database,
    store_folder,
    without_password,
)

if TYPE_CHECKING:
    from resnet_dist.driver.request import Summary
    from resnet_dist.launch.torchrun import TorchrunRanks
    from resnet_dist.runs.folder import RunFolder
    from resnet_dist.study.report import StudySummary

NOTHING_SAVED = "interrupted before training began; the same command begins it"


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.py")],
    overrides: Overrides = None,
    workers: Workers = None,
    gpu: Gpu = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    address: Address = None,
    name: Name = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest run of this recipe.")] = False,
    begin_from: BeginFrom = None,
    register: Register = None,
    output: RunOutput = str(DEFAULT_OUTPUT),
    max_restarts: MaxRestarts = DEFAULT_MAX_RESTARTS,
    wait: Wait = None,
    also: AlsoTo = None,
    profile: Profile = None,
) -> None:
    """Train a recipe, or continue its run."""
    check_single_start(address)
    registration = registration_of(register)
    check_machine(
        local=local, address=address, workers=None if workers is None else workers.preferred, gpu=gpu
    )
    others = check_also(also or ())
    loaded = None if started_by_torchrun() else load(recipe, overrides)
    if not local and not started_by_torchrun():
        _begin_on_ray(address)
    # Nothing has started yet, and an exception during numpy's or torch's import would leave them half imported:
    # exit at once.
    with handle_signals(exit_with_message(NOTHING_SAVED)):
        from resnet_dist.driver.request import Interrupted, Request
        from resnet_dist.driver.run import run_training
        from resnet_dist.runs.storage.open import resolved
        from resnet_dist.tracking.abandoned import closing_abandoned
        from resnet_dist.tracking.also.beside import with_others
        from resnet_dist.tracking.open import check_tracker, open_publisher

        ranks = _torchrun_ranks()
    if ranks is not None and ranks.rank > 0:
        raise typer.Exit(ranks.follow())
    try:
        with ranks or nullcontext(), make_reporter(out) as reporter:
            # Under torchrun the recipe is loaded here, so that a mistake in it ends the other ranks too.
            value, changes = loaded or load(recipe, overrides)
            place = resolved(output)
            check_tracker(store_folder(place), value.experiment or value.name)
            flags = (workers, gpu, local, address, name, resume, begin_from, ranks)
            wanted = (max_restarts, wait, others, profile, str(registration or ""))
            request = Request(value, str(recipe), place, *flags, {}, *wanted, changes)
            summary = run_training(request, reporter, with_others(closing_abandoned(open_publisher)))
    except Interrupted as interrupted:
        where = f" at step {interrupted.step}" if interrupted.step is not None else ""
        err.print(f"interrupted{where}; {resume_advice(interrupted.run.name)}")
        raise typer.Exit(interrupted.exit_code) from None
    except KeyboardInterrupt:
        err.print(NOTHING_SAVED)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
    _print_summary(summary, place)
    exit_where_left(summary.not_evaluated, [summary.run])


def exit_where_left(
    not_evaluated: Sequence[str], runs: Sequence[RunFolder], study: tuple[Path, Sequence[str]] = (Path(), ())
) -> None:
    """End the command, whose runs are finished, with the exit code of what was not sent, or not evaluated.

    not_evaluated: steps with their reasons. study: as of `report_unsent`.
    """
    if not_evaluated:
        err.print(f"exit code {LEFT_OUT}: not evaluated: {', '.join(not_evaluated)}")
    if report_unsent(runs, study):
        raise typer.Exit(UNSENT_EXIT_CODE)
    if not_evaluated:
        raise typer.Exit(LEFT_OUT)


def _begin_on_ray(address: str | None) -> None:
    """Find the cluster, before the large imports and before data is prepared: a wrong address is found in seconds.

    Without a cluster, a process begins to import beside this one, for the ranks.
    """
    check_tracking_uri()
    from resnet_dist.launch.preload.client import import_ahead
    from resnet_dist.launch.ray_cluster.check import find_cluster

    if find_cluster(address) is None:
        import_ahead()


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
        from resnet_dist.study.request import StudyRequest
        from resnet_dist.study.run import StudyInterrupted, run_study
        from resnet_dist.tracking.abandoned import closing_abandoned
        from resnet_dist.tracking.also.beside import with_others
        from resnet_dist.tracking.open import check_tracker, open_publisher, open_study

    folder = local_folder(str(output), "--output").absolute()
    check_tracker(folder, value.experiment)
    request = StudyRequest(value, str(job), folder, workers, gpu, address, name, others)
    publisher = with_others(closing_abandoned(open_publisher))
    with make_reporter(out, training_lines=False) as reporter:
        try:
            summary = run_study(request, reporter, open_study, publisher)
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
        f"table      {short_path(summary.table)}{browse_line(output)}"
    )


def load(recipe: Path, overrides: list[str] | None) -> tuple[Recipe, str]:
    """Read a recipe file; return the recipe, and what the overrides change of its file.

    What the file prints is shown: it is the person's own code.
    """
    with shown():
        of_file = load_recipe(recipe)
    value = of_file.with_overrides(overrides or ())
    return value, changes_text(value, of_file)


def _print_summary(summary: Summary, output: str) -> None:
    metrics = summary.outcome.metrics
    top1 = "not evaluated"  # where the evaluations beside training have failed
    if "eval/top1" in metrics:
        top1 = f"{metrics['eval/top1']:.2%} of {metrics['eval/samples']:.0f} held-out samples"
    out.print(
        f"top-1      {top1}\n"
        f"speed      {metrics['perf/images_per_second']:,.0f} images/s, {summary.seconds:.0f} s in all\n"
        f"checkpoint {short_path(summary.checkpoint)}{browse_line(store_folder(output))}"
    )


def _torchrun_ranks() -> TorchrunRanks | None:
    """Return the ranks that torchrun has started; None without torchrun."""
    if not started_by_torchrun():
        return None
    from resnet_dist.launch.torchrun import TorchrunRanks

    return TorchrunRanks()


def report_unsent(
    runs: Sequence[RunFolder],
    study: tuple[Path, Sequence[str]] = (Path(), ()),
    code: int = UNSENT_EXIT_CODE,
) -> bool:
    """Print what MLflow did not get of runs, with the exit code of the command; report whether there is any.

    study: the folder of the study or sweep that they belong to, and what MLflow did not get of it besides the runs.
    """
    from resnet_dist.runs.folder import unsent_summary
    from resnet_dist.runs.study_folder import kind_of, unsent_line

    lines = [
        f"run {run.name} {'is trained, but' if run.status == 'FINISHED' else 'has'} {unsent_summary(run)}"
        for run in runs
        if run.unsent
    ]
    folder, unsent = study
    lines += (
        [f"{kind_of(folder).word} {folder.name} is complete, but {unsent_line(folder, unsent)}"]
        if unsent
        else []
    )
    for line in lines:
        err.print(f"exit code {code}: {line}")
    return bool(lines)


def browse_line(output: Path) -> str:
    """Return one more line to print, with the place to browse the runs; empty without MLflow."""
    from resnet_dist.tracking.open import has_mlflow

    if not has_mlflow():
        return ""
    uri = os.environ.get(URI_VARIABLE, "")
    if uri and not is_database(uri):
        return f"\nbrowse     {without_password(uri)}"
    # The command reads the variable too; it is repeated for another shell, where it holds no password.
    variable = f"{URI_VARIABLE}={quoted(uri)} " if uri and not has_password(uri) else ""
    there = (
        "" if output.absolute() == DEFAULT_OUTPUT.absolute() or uri else f" --output {quoted(str(output))}"
    )
    return f"\nbrowse     {variable}resnet-dist ui{there}"


def short_path(location: Path | str | None) -> str | None:
    """Return a path relative to the working folder where it is inside, and a URL as it is."""
    return None if location is None else str(location).removeprefix(f"{Path.cwd()}/")
