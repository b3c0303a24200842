"""The request of a person to train a recipe on a cluster, and the job that it becomes."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from resnet_dist.config import ProfiledSteps, Recipe, WorkerRange
from resnet_dist.launch.jobs import job
from resnet_dist.launch.jobs.environment import (
    STOP_SECONDS_VARIABLE,
    STOP_SIGNAL_VARIABLE,
    without_secrets,
)
from resnet_dist.launch.jobs.files import WorkingFolder
from resnet_dist.launch.ray_cluster.job import RECIPE_FILE, start_command
from resnet_dist.system.command import COMMAND_VARIABLE, joined
from resnet_dist.system.provenance import (
    CHANGES_VARIABLE,
    GIT_BRANCH_VARIABLE,
    GIT_COMMIT_VARIABLE,
    SOURCE_VARIABLE,
    USER_VARIABLE,
    git_state,
    user_name,
)
from resnet_dist.system.redact import redact
from resnet_dist.tracking.store import URI_VARIABLE, without_password

# Ray's default, 3 s after a SIGTERM, is too soon for a checkpoint.
STOP_SECONDS = 28
MAX_CHANGES = 8000  # characters; MLflow's limit for a tag


@dataclass(frozen=True)
class Submission:
    """One request to train a recipe on a cluster, with the flags of `submit`."""

    recipe: Recipe
    source: Path  # the recipe file
    address: str  # as find_dashboard() returns it
    workers: WorkerRange
    gpu: bool | None
    name: str | None  # the name of the run
    resume: bool
    output: Path | str  # a folder on the cluster, or a URL
    detach: bool  # return once the job is submitted
    command: str  # the command as it was typed, for the advice that names how to resume
    max_restarts: int
    wait_seconds: float | None
    also: tuple[str, ...] = ()  # what gets the metrics beside MLflow
    profile: ProfiledSteps | None = None  # steps whose trace is written
    begin_from: str | None = None  # RUN or RUN@STEP, which the cluster looks up
    register: str = ""  # NAME or NAME@ALIAS for the model; empty: none
    variables: Mapping[str, str] = field(default_factory=dict)  # additional ones of the job's environment
    working: WorkingFolder | None = None  # sent with the recipe
    changes: str = ""  # what the command changes of the recipe file, without passwords


def new_name(recipe: Recipe) -> str:
    """Return a name for a new run, so that messages can quote it before the job has begun."""
    # The last part keeps two people apart who submit in the same second: the second would continue the run of the first.
    return f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def entrypoint(submission: Submission) -> list[str]:
    """Return the command that the cluster runs: `train`, with the flags of `submit`."""
    command = ["train", RECIPE_FILE, "--address", "auto", "--workers", str(submission.workers)]
    command += ["--output", str(submission.output), "--max-restarts", str(submission.max_restarts)]
    if submission.wait_seconds is not None:
        command += ["--wait", f"{submission.wait_seconds:g}"]
    if submission.gpu is not None:
        command.append("--gpu" if submission.gpu else "--cpu")
    if submission.name:
        command += ["--name", submission.name]
    if submission.begin_from:
        command += ["--from", submission.begin_from]
    if submission.profile is not None:
        command += ["--profile", str(submission.profile)]
    for store in submission.also:
        command += ["--also", store]
    if submission.register:
        command += ["--register", submission.register]
    return start_command([*command, "--resume"] if submission.resume else command)


def job_environment(submission: Submission) -> dict[str, str]:
    """Return the environment of the job: how Ray stops it, where it comes from, the MLflow server, and `--env`."""
    environment = {STOP_SIGNAL_VARIABLE: "SIGINT", STOP_SECONDS_VARIABLE: str(STOP_SECONDS)}
    environment[COMMAND_VARIABLE] = shown_command(submission)
    environment[SOURCE_VARIABLE] = str(submission.source)
    environment[USER_VARIABLE] = user_name()
    if (git := git_state(submission.source.parent)) is not None:
        environment |= {GIT_COMMIT_VARIABLE: git.commit, GIT_BRANCH_VARIABLE: redact(git.branch)}
    if submission.changes:
        environment[CHANGES_VARIABLE] = submission.changes[:MAX_CHANGES]
    if uri := os.environ.get(URI_VARIABLE):
        # Everyone who sees the jobs of the cluster sees it.
        environment[URI_VARIABLE] = without_password(uri)
    return {**environment, **submission.variables}


def job_metadata(submission: Submission) -> dict[str, str]:
    """Return what the other commands, on any machine, read of a job."""
    return {
        job.RUN: submission.name or "",
        job.USER: user_name(),
        job.RECIPE: submission.recipe.name,
        job.SOURCE: str(submission.source),
        job.OUTPUT: redact(str(submission.output)),
        job.COMMAND: shown_command(submission),
    }


def shown_command(submission: Submission) -> str:
    """Return the command as it was typed, without secrets: everyone who may ask the cluster for its jobs reads it."""
    return redact(joined(without_secrets(shlex.split(submission.command))))
