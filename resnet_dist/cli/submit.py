"""The command that trains a recipe on a cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnet_dist.cli.main import exit_with_message
from resnet_dist.cli.options import (
    DEFAULT_OUTPUT,
    AlsoTo,
    BeginFrom,
    Dashboard,
    Gpu,
    MaxRestarts,
    Name,
    Overrides,
    Profile,
    Register,
    Wait,
    Workers,
    err,
    leaves_jobs,
    on_interrupt,
    out,
    typed_place,
)
from resnet_dist.cli.training.train import load
from resnet_dist.config import DEFAULT_MAX_RESTARTS, WorkerRange
from resnet_dist.errors import UserError
from resnet_dist.launch.jobs.environment import parse_variables, secrets_warning
from resnet_dist.launch.ray_cluster.job import credentials_left_out
from resnet_dist.system.command import typed_line
from resnet_dist.system.signals import handle_signals
from resnet_dist.tracking.also.choose import check_names
from resnet_dist.tracking.registration import Registration
from resnet_dist.tracking.store import URI_VARIABLE, check_tracking_uri, has_password, shown_tracker

if TYPE_CHECKING:
    from resnet_dist.launch.jobs.submission import Submission

NOT_SUBMITTED = "interrupted before the job was submitted"


Resume = Annotated[bool, typer.Option("--resume", help="Continue the newest run of this recipe.")]
ClusterOutput = Annotated[
    str,
    typer.Option(
        callback=typed_place,
        help="On the cluster: a folder that all nodes share, or a URL such as s3://BUCKET/PREFIX.",
    ),
]
Detach = Annotated[bool, typer.Option("--detach", help="Do not wait for the job.")]
Env = Annotated[
    list[str] | None,
    typer.Option(
        "--env", metavar="KEY[=VALUE]", help="A variable of the job; without VALUE, that of this shell."
    ),
]
WorkingDir = Annotated[
    Path | None,
    typer.Option(
        "--working-dir", metavar="DIR", help="Send this folder, for the files in it that the recipe names."
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="PATTERN", help="Leave this out of --working-dir; a pattern of .gitignore."
    ),
]


@on_interrupt(NOT_SUBMITTED)
def submit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.py")],
    overrides: Overrides = None,
    workers: Workers = None,
    gpu: Gpu = None,
    address: Dashboard = None,
    name: Name = None,
    resume: Resume = False,
    begin_from: BeginFrom = None,
    register: Register = None,
    output: ClusterOutput = str(DEFAULT_OUTPUT),
    detach: Detach = False,
    max_restarts: MaxRestarts = DEFAULT_MAX_RESTARTS,
    wait: Wait = None,
    env: Env = None,
    working_dir: WorkingDir = None,
    exclude: Exclude = None,
    also: AlsoTo = None,
    profile: Profile = None,
) -> None:
    """Train a recipe on a running Ray cluster, through Ray Jobs: follow the log, exit with the job's code."""
    variables, registered = parse_variables(env or ()), _registered(register)
    if exclude and working_dir is None:
        raise UserError(f"--exclude {exclude[0]}: it leaves out files of --working-dir, which is missing")
    value, changes = load(recipe, overrides)
    check_submitted_tracker()
    dashboard = _find_dashboard(address)
    with handle_signals(exit_with_message(NOT_SUBMITTED)):  # The same as in `train`.
        from resnet_dist.driver.preflight import absolute_paths, check_recipe
        from resnet_dist.launch.jobs.files import read_working_folder
        from resnet_dist.launch.jobs.submission import Submission
        from resnet_dist.runs.storage.open import resolved

    ranks = workers or WorkerRange.default(value)
    check_recipe(value, ranks)
    working = None if working_dir is None else read_working_folder(working_dir, exclude or ())
    note = credentials_left_out(variables)
    _print_lines(secrets_warning(variables), "" if working is None else working.summary(), note)
    submission = Submission(
        recipe=absolute_paths(value, *(() if working is None else (working.sent,))),
        source=recipe,
        address=dashboard,
        workers=ranks,
        gpu=gpu,
        name=name,
        resume=resume,
        begin_from=begin_from,
        also=check_names(also or ()),
        profile=profile,
        register=registered,
        output=resolved(output),
        detach=detach,
        command=typed_line(),
        max_restarts=max_restarts,
        wait_seconds=wait,
        variables=variables,
        working=working,
        changes=changes,
    )
    raise typer.Exit(_submit(submission, note))


def _find_dashboard(address: str | None) -> str:
    from resnet_dist.launch.ray_cluster.check import find_dashboard  # Here, because `--help` needs none.

    return find_dashboard(address, err.print)


def _registered(text: str | None) -> str:
    """Return the value of --register, which may need an MLflow that only the cluster has; empty without it."""
    return "" if text is None else str(Registration.parse(text))


def _print_lines(*lines: str) -> None:
    for line in filter(None, lines):
        err.print(line)


def _submit(submission: Submission, note: str) -> int:
    """Submit a job, follow it, and return its exit code. note: repeated below the log of a job that failed."""
    from resnet_dist.launch.jobs.submit import submit_job

    with leaves_jobs():
        code = submit_job(submission, lambda text: out.print(text, end=""), err.print)
    if note and code:  # It may be the cause, and the log of the job has moved it out of sight.
        err.print(note)
    return code


def check_submitted_tracker() -> None:
    """Raise UserError where MLFLOW_TRACKING_URI is wrong, or has a password: everybody can read the variables of a job."""
    check_tracking_uri()
    if has_password(os.environ.get(URI_VARIABLE, "")):
        raise UserError(
            f"{URI_VARIABLE}={shown_tracker()}: everybody who sees the cluster's jobs would see the password; leave it out "
            "of the address, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole variable, on the "
            "cluster's machines"
        )
