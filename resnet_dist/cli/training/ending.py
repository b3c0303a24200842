"""The end of a command that trains: its last lines, and the exit code for what was not sent, or not evaluated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from resnet_dist.cli.options import DEFAULT_OUTPUT, err
from resnet_dist.data.findings import LEFT_OUT
from resnet_dist.errors import UNSENT_EXIT_CODE
from resnet_dist.system.command import quoted
from resnet_dist.tracking.store import URI_VARIABLE, has_password, is_database, without_password

if TYPE_CHECKING:
    from resnet_dist.runs.folder import RunFolder

PAGE_SECONDS = 5.0  # for the number of an experiment, which is in the address of its page
NOTHING_SAVED = "interrupted before training began; the same command begins it"


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


def report_unsent(
    runs: Sequence[RunFolder],
    study: tuple[Path, Sequence[str]] = (Path(), ()),
    code: int = UNSENT_EXIT_CODE,
) -> bool:
    """Print what MLflow did not get of runs, with the exit code of the command; report whether there is any.

    study: the folder of the study or sweep that they belong to, and what MLflow did not get of it besides the runs.
    """
    from resnet_dist.runs.folder import unsent_summary
    from resnet_dist.runs.group_folder import kind_of, unsent_line

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


def browse_line(output: Path, experiment: str) -> str:
    """Return one more line to print, with the place to browse the runs; empty without MLflow.

    experiment: its page is the place, where a server shows one.
    """
    from resnet_dist.tracking.open import has_mlflow

    if not has_mlflow():
        return ""
    uri = os.environ.get(URI_VARIABLE, "")
    if uri and not is_database(uri):
        return f"\nbrowse     {experiment_page(uri, output, experiment) or without_password(uri)}"
    # The command reads the variable too; it is repeated for another shell, where it holds no password.
    variable = f"{URI_VARIABLE}={quoted(uri)} " if uri and not has_password(uri) else ""
    there = (
        "" if output.absolute() == DEFAULT_OUTPUT.absolute() or uri else f" --output {quoted(str(output))}"
    )
    return f"\nbrowse     {variable}resnet-dist ui{there}"


def experiment_page(uri: str, output: Path, experiment: str) -> str:
    """Return the address of an experiment's page; empty where no server answers with one in PAGE_SECONDS."""
    if not uri.startswith(("http://", "https://")):
        return ""
    try:
        from resnet_dist.system.limit import within
        from resnet_dist.tracking.mlflow.reading import Tracker

        return within(PAGE_SECONDS, lambda: Tracker.open(output).page_of_experiment(experiment))
    # A server may fail in any way, and what it did not get is reported elsewhere. Training has ended: an interruption ends
    # this wait alone, and the results are printed.
    except (Exception, KeyboardInterrupt):
        return ""


def short_path(location: Path | str | None) -> str | None:
    """Return a path relative to the working folder where it is inside, and a URL as it is."""
    return None if location is None else str(location).removeprefix(f"{Path.cwd()}/")
