"""Ray Jobs: send a recipe to a running cluster, follow its log, end with its exit code."""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray is imported

from ray.job_submission import JobStatus, JobSubmissionClient

from resnet_dist.config import Recipe, UserError
from resnet_dist.driver import check_recipe
from resnet_dist.interrupts import signals_call
from resnet_dist.launcher import COMMAND_VARIABLE
from resnet_dist.tracking.run import GIT_COMMIT_VARIABLE, URI_VARIABLE, git_commit

RECIPE_FILE = "recipe.json"
POLL_SECONDS = 1.0
EXIT_CODES = {JobStatus.SUCCEEDED: 0, JobStatus.FAILED: 1, JobStatus.STOPPED: 130}


@dataclass(frozen=True)
class Submission:
    """What a person asked the cluster to train."""

    recipe: Recipe
    source: Path
    address: str
    workers: int
    gpu: bool | None
    name: str | None
    resume: bool
    output: Path
    detach: bool
    command: str  # as the person typed it, for the line that continues the run


def submit_job(submission: Submission, write: Callable[[str], None]) -> int:
    """Submit, print the log as it comes, and return the exit code; 0 at once where detached.

    Raises UserError before anything is sent where the recipe, the ranks or the address cannot be used.
    """
    check_recipe(submission.recipe, submission.workers)
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)  # not a line for every upload
    client = _connect(submission.address)
    with tempfile.TemporaryDirectory() as folder:
        # The recipe travels as a value: the cluster needs the package, not the person's files.
        (Path(folder) / RECIPE_FILE).write_text(submission.recipe.to_json())
        job = client.submit_job(
            entrypoint=shlex.join(entrypoint(submission)),
            runtime_env={"working_dir": folder, "env_vars": job_environment(submission)},
            metadata={"recipe": submission.recipe.name},
        )
    write(f"job {job}\n")
    if submission.detach:
        return 0
    return _follow(client, job, write)


def entrypoint(submission: Submission) -> list[str]:
    """The command that the cluster runs: `train`, with the flags that were given to `submit`."""
    words = ["resnet-dist", "train", RECIPE_FILE, "--address", "auto", "--workers", str(submission.workers)]
    words += ["--output", str(submission.output)]
    if submission.gpu is not None:
        words.append("--gpu" if submission.gpu else "--cpu")
    if submission.name:
        words += ["--name", submission.name]
    return [*words, "--resume"] if submission.resume else words


def job_environment(submission: Submission) -> dict[str, str]:
    # Ray's own stop is SIGTERM and three seconds: too few for a checkpoint.
    environment = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "28"}
    environment[COMMAND_VARIABLE] = submission.command
    commit = git_commit(submission.source.parent)
    if commit:
        environment[GIT_COMMIT_VARIABLE] = commit
    if os.environ.get(URI_VARIABLE):
        environment[URI_VARIABLE] = os.environ[URI_VARIABLE]
    return environment


def _connect(address: str) -> JobSubmissionClient:
    # Set, these would override what the person typed.
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(variable, None)
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # Ray raises RuntimeError, ConnectionError and requests' own, by cause
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--address {address}: no Ray cluster answers there ({first_line})") from None


def _follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> int:
    """Print what the log gains until the job has ended. A signal stops the job; its last words are waited for."""

    def stop(count: int) -> None:
        if count > 1:
            raise KeyboardInterrupt
        client.stop_job(job)

    printed = 0
    with signals_call(stop):
        while True:
            status = client.get_job_status(job)  # before the log: what it says once ended is all there is
            text = client.get_job_logs(job)
            write(text[printed:])
            printed = len(text)
            if status.is_terminal():
                return exit_code(client, job, status)
            time.sleep(POLL_SECONDS)


def exit_code(client: JobSubmissionClient, job: str, status: JobStatus) -> int:
    """The entrypoint's own exit code where Ray knows it."""
    code = client.get_job_info(job).driver_exit_code
    return code if code else EXIT_CODES[status]
