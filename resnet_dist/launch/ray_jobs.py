"""Ray Jobs: send a recipe to a running cluster, follow its log, end with its exit code."""

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

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray is imported

from ray.job_submission import JobStatus, JobSubmissionClient

from resnet_dist.config import Recipe
from resnet_dist.errors import UserError
from resnet_dist.system.command import COMMAND_VARIABLE
from resnet_dist.system.provenance import GIT_COMMIT_VARIABLE, SOURCE_VARIABLE, USER_VARIABLE, git_commit
from resnet_dist.system.signals import signals_call
from resnet_dist.tracking.mlflow.run import URI_VARIABLE

RECIPE_FILE = "recipe.json"
POLL_SECONDS = 1.0
LOST_SECONDS = 60.0  # without an answer, after which the job is left to itself: a head restarts in less
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


class JobLeft(Exception):
    """The job was left to itself: why, how it is found again, and the exit code for it."""

    def __init__(self, code: int, reason: str, client: JobSubmissionClient, job: str) -> None:
        address = client.get_address()
        super().__init__(
            f"{reason}; job {job} is not stopped by this. To see or stop it:\n"
            f"  ray job logs --follow --address {address} {job}\n"
            f"  ray job stop --address {address} {job}"
        )
        self.code = code


def submit_job(submission: Submission, write: Callable[[str], None]) -> int:
    """Submit, print the log as it comes, and return the exit code; 0 at once where detached.

    Raises UserError before anything is sent where the address cannot be used; JobLeft
    where the job may live on though this ends, interrupted or not.
    """
    for name in (
        "ray.dashboard.modules.dashboard_sdk",
        "ray._private.runtime_env.packaging",
        "ray.dashboard.modules.job.sdk",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)  # not a line for every upload and connection
    client = _connect(submission.address)
    job = f"raysubmit_{secrets.token_hex(8)}"  # chosen here, so that it can be named whatever happens
    try:
        _send(client, submission, job)
        write(f"job {job}\n")
        return 0 if submission.detach else _follow(client, job, write)
    except KeyboardInterrupt:
        raise JobLeft(130, "interrupted", client, job) from None


def _send(client: JobSubmissionClient, submission: Submission, job: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # The recipe travels as a value: the cluster needs the package, not the person's files.
        (Path(folder) / RECIPE_FILE).write_text(submission.recipe.to_json())
        try:
            client.submit_job(
                entrypoint=shlex.join(entrypoint(submission)),
                submission_id=job,
                runtime_env={"working_dir": folder, "env_vars": job_environment(submission)},
                metadata={"recipe": submission.recipe.name},
            )
        except Exception as error:  # as in _connect
            raise JobLeft(1, f"the job may not have begun ({_first_line(error)})", client, job) from None


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
    environment[SOURCE_VARIABLE] = str(submission.source)
    with suppress(KeyError, OSError):  # a container may have a user without a name
        environment[USER_VARIABLE] = getpass.getuser()
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
        raise UserError(f"--address {address}: no Ray cluster answers there ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> int:
    """Print what the log gains until the job has ended. A signal stops the job; its last words are waited for.

    Raises JobLeft where the cluster has not answered for LOST_SECONDS, KeyboardInterrupt for a second signal.
    """

    def stop(count: int) -> None:
        if count > 1:
            raise KeyboardInterrupt
        try:
            client.stop_job(job)
        except Exception as error:  # as in _connect
            write(f"job {job} could not be stopped ({_first_line(error)}); Ctrl-C again leaves it\n")

    log, lost_since = _Log(client, job, write), None
    with signals_call(stop):
        while True:
            try:
                status = client.get_job_status(job)  # before the log: what it says once ended is all there is
                lost_since = None
                if status.is_terminal():
                    log.rest()
                    return exit_code(client, job, status)
                asyncio.run(log.tail())  # until the job ends; sooner where the connection does
            except Exception as error:  # as in _connect
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since >= LOST_SECONDS:
                    raise JobLeft(
                        1, f"no answer for {LOST_SECONDS:.0f} s ({_first_line(error)})", client, job
                    ) from None
            time.sleep(POLL_SECONDS)


class _Log:
    """What of a job's log has been printed: each character once, however often the connection is lost."""

    def __init__(self, client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> None:
        self._client, self._job, self._write = client, job, write
        self._printed = 0

    async def tail(self) -> None:
        """Print what comes, as it comes. A new connection tells the log from its beginning."""
        position = 0
        async for text in self._client.tail_job_logs(self._job):
            self._print(text, position)
            position += len(text)

    def rest(self) -> None:
        self._print(self._client.get_job_logs(self._job), 0)

    def _print(self, text: str, position: int) -> None:
        fresh = text[max(0, self._printed - position) :]
        if fresh:
            self._write(fresh)
            self._printed = position + len(text)


def exit_code(client: JobSubmissionClient, job: str, status: JobStatus) -> int:
    """The entrypoint's own exit code where Ray knows it."""
    code = client.get_job_info(job).driver_exit_code
    return code if code else EXIT_CODES[status]
