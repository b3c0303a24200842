"""Ray Jobs: submit a recipe to a running cluster, follow the log of the job, and end with its exit code."""

from __future__ import annotations

import asyncio
import getpass
import logging
import os
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.launch.ray_cluster.address import DASHBOARD_VARIABLE
from resnet_dist.launch.ray_cluster.check import job_headers
from resnet_dist.launch.ray_cluster.job import add_start_file, start_command
from resnet_dist.launch.ray_settings import ADDRESS_VARIABLE, set_defaults

set_defaults()

from ray.job_submission import JobStatus, JobSubmissionClient

from resnet_dist.config import Recipe, WorkerRange
from resnet_dist.errors import INTERRUPTED_EXIT_CODE, UserError
from resnet_dist.system.command import COMMAND_VARIABLE
from resnet_dist.system.provenance import GIT_COMMIT_VARIABLE, SOURCE_VARIABLE, USER_VARIABLE, git_commit
from resnet_dist.system.redact import redact
from resnet_dist.system.signals import handle_signals
from resnet_dist.tracking.store import URI_VARIABLE, without_password

RECIPE_FILE = "recipe.json"
POLL_SECONDS = 1.0
# After this long without an answer this command ends and leaves the job; a head restarts in less time.
LOST_SECONDS = 60.0
EXIT_CODES = {JobStatus.SUCCEEDED: 0, JobStatus.FAILED: 1, JobStatus.STOPPED: INTERRUPTED_EXIT_CODE}


@dataclass(frozen=True)
class Submission:
    """One request to train a recipe on a cluster, with the flags of `submit`."""

    recipe: Recipe
    source: Path  # the recipe file
    address: str  # as find_dashboard() returns it
    workers: WorkerRange
    gpu: bool | None
    name: str | None
    resume: bool
    output: Path | str  # a folder on the cluster, or a URL
    detach: bool  # return once the job is submitted
    command: str  # the command as it was typed, for the advice that names how to resume
    max_restarts: int
    wait_seconds: float | None


class JobLeft(Exception):
    """This command ends but the job may still run: states why, and how to show or stop the job."""

    def __init__(self, reason: str, client: JobSubmissionClient, job: str, *, exit_code: int) -> None:
        address = client.get_address()
        super().__init__(
            f"{reason}; job {job} is not stopped by this. To see or stop it:\n"
            f"  ray job logs --follow --address {address} {job}\n"
            f"  ray job stop --address {address} {job}"
        )
        self.exit_code = exit_code


def submit_job(submission: Submission, write: Callable[[str], None]) -> int:
    """Submit a job, print its log as it grows, and return its exit code; where detached, return 0 at once.

    Raises UserError before anything is sent where the address cannot be used; JobLeft where this ends,
    interrupted or not, and the job may still run.
    """
    for name in (
        "ray.dashboard.modules.dashboard_sdk",
        "ray._private.runtime_env.packaging",
        "ray.dashboard.modules.job.sdk",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)  # They log a line for every upload and connection.
    client = _connect(submission.address)
    # Choose the name here, so that a message can quote it even where the submission fails.
    job = f"raysubmit_{secrets.token_hex(8)}"
    try:
        _send(client, submission, job)
        write(f"job {job}\n")
        return 0 if submission.detach else _follow(client, job, write)
    except KeyboardInterrupt:
        raise JobLeft("interrupted", client, job, exit_code=INTERRUPTED_EXIT_CODE) from None


def _send(client: JobSubmissionClient, submission: Submission, job: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # The recipe travels as a value: the cluster needs the package, not the person's files.
        (Path(folder) / RECIPE_FILE).write_text(submission.recipe.to_json())
        add_start_file(Path(folder))
        try:
            client.submit_job(
                entrypoint=shlex.join(entrypoint(submission)),
                submission_id=job,
                runtime_env={"working_dir": folder, "env_vars": job_environment(submission)},
                metadata={"recipe": submission.recipe.name},
            )
        except Exception as error:  # Ray raises several types, see _connect.
            reason = f"the job may not have begun ({_first_line(error)})"
            raise JobLeft(reason, client, job, exit_code=1) from None


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
    return start_command([*command, "--resume"] if submission.resume else command)


def job_environment(submission: Submission) -> dict[str, str]:
    """Return the environment of the job: how Ray stops it, where it comes from, and the MLflow server."""
    # By default Ray sends SIGTERM and kills three seconds later: too soon for a checkpoint.
    environment = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "28"}
    environment[COMMAND_VARIABLE] = redact(submission.command)  # Ray's dashboard shows it.
    environment[SOURCE_VARIABLE] = str(submission.source)
    with suppress(KeyError, OSError):  # A container may run under a user id without a name.
        environment[USER_VARIABLE] = getpass.getuser()
    commit = git_commit(submission.source.parent)
    if commit:
        environment[GIT_COMMIT_VARIABLE] = commit
    if uri := os.environ.get(URI_VARIABLE):
        environment[URI_VARIABLE] = without_password(uri)  # Ray's dashboard shows it too.
    return environment


def _connect(address: str) -> JobSubmissionClient:
    # Ray prefers these variables, where they are set, to the address that the person typed.
    for variable in (ADDRESS_VARIABLE, DASHBOARD_VARIABLE):
        os.environ.pop(variable, None)
    try:
        return JobSubmissionClient(address, headers=job_headers())
    except Exception as error:  # Ray raises RuntimeError, ConnectionError or an error of requests.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--address {address}: no Ray cluster answers there ({reason})") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> int:
    """Print the log of the job as it grows, until the job has ended; return its exit code.

    A signal stops the job, and the rest of its log is still printed. Raises KeyboardInterrupt for a second
    signal, JobLeft where the cluster has not answered for LOST_SECONDS.
    """

    def stop(count: int) -> None:
        if count > 1:
            raise KeyboardInterrupt
        try:
            client.stop_job(job)
        except Exception as error:  # Ray raises several types, see _connect.
            write(f"job {job} could not be stopped ({_first_line(error)}); Ctrl-C again leaves it\n")

    log, lost_since = _Log(client, job, write), None
    with handle_signals(stop):
        while True:
            try:
                # Read the status before the log: the log of a job that had ended by then is complete.
                status = client.get_job_status(job)
                lost_since = None
                if status.is_terminal():
                    log.print_rest()
                    return job_exit_code(client, job, status)
                asyncio.run(log.tail())
            except Exception as error:  # Ray raises several types, see _connect.
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since >= LOST_SECONDS:
                    reason = f"no answer for {LOST_SECONDS:.0f} s ({_first_line(error)})"
                    raise JobLeft(reason, client, job, exit_code=1) from None
            time.sleep(POLL_SECONDS)


class _Log:
    """The log of a job, of which each character is printed once, however often the connection is lost."""

    def __init__(self, client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> None:
        self._client, self._job, self._write = client, job, write
        self._num_printed = 0  # characters

    async def tail(self) -> None:
        """Print the log until the job ends or the connection is lost.

        A new connection starts at the log's beginning.
        """
        position = 0
        async for text in self._client.tail_job_logs(self._job):
            self._print(text, position)
            position += len(text)

    def print_rest(self) -> None:
        self._print(self._client.get_job_logs(self._job), 0)

    def _print(self, text: str, position: int) -> None:
        fresh = text[max(0, self._num_printed - position) :]
        if fresh:
            self._write(fresh)
            self._num_printed = position + len(text)


def job_exit_code(client: JobSubmissionClient, job: str, status: JobStatus) -> int:
    """Return the exit code of the job's command where Ray knows it, else the one of its status."""
    code = client.get_job_info(job).driver_exit_code
    return code if code else EXIT_CODES[status]
