"""Submit a recipe to a running cluster as a Ray job, and follow it."""

from __future__ import annotations

import re
import secrets
import shlex
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_dist.launch.jobs.advice import JobLeft, commands
from resnet_dist.launch.jobs.client import cause_line, connect
from resnet_dist.launch.jobs.files import pack
from resnet_dist.launch.jobs.follow import Write, follow, left_alone
from resnet_dist.launch.jobs.job import Job
from resnet_dist.launch.jobs.submission import (
    Submission,
    entrypoint,
    job_environment,
    job_metadata,
    new_name,
    shown_command,
)
from resnet_dist.system.limit import within
from resnet_dist.system.redact import redact

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGE_FILE = "job.zip"
# A head that has just started answers before the agent that begins its jobs does, and then begins none: its answer is
# this sentence, or the traceback of the connection that failed.
NO_AGENT = "No available agent"
_HEAD_FAILED = re.compile(r"status code 5\d\d\b")
_BEGUN = "already exists"
AGENT_SECONDS, POLL_SECONDS = 60.0, 2.0
SEND_SECONDS = 600.0  # enough for a large package over a slow link; one that is cut would never answer


def submit_job(submission: Submission, write: Write, report: Write) -> int:
    """Submit a job, print its log as it grows, and return its exit code; where detached, return 0 at once.

    write: gets the log; report: lines of our own. Raises UserError before anything is sent where the address cannot
    be used; JobLeft where this ends, interrupted or not, and the job may still run.
    """
    client = connect(submission.address)
    address = client.get_address()
    if not submission.name and not submission.resume:
        submission = replace(submission, name=new_name(submission.recipe))
    job = Job(
        # Choose it here, so that a message can quote it even where the submission fails.
        f"raysubmit_{secrets.token_hex(8)}",
        "PENDING",
        submission.name or "",
        output=redact(str(submission.output)),
        command=shown_command(submission),
    )
    try:
        _send(client, submission, job, report)
        write(f"{job.title}\n")
        if submission.detach:
            write(f"{commands(job, address)}\n")
            return 0
        return follow(client, job, write, report, stops=True)
    except KeyboardInterrupt:
        raise left_alone(job, address) from None


def _send(client: JobSubmissionClient, submission: Submission, job: Job, report: Write) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # The recipe travels as a value: the cluster needs the package, not the person's files.
        package = Path(folder) / PACKAGE_FILE
        pack(package, submission.recipe.to_json(), submission.working)
        request = {
            "entrypoint": shlex.join(entrypoint(submission)),
            "submission_id": job.id,
            "runtime_env": {"working_dir": str(package), "env_vars": job_environment(submission)},
            "metadata": job_metadata(submission),
        }
        try:
            _request(client, request, report)
        except Exception as error:  # Ray raises several types, see client.connect.
            reason = f"the job may not have begun ({cause_line(error)})"
            raise JobLeft(reason, job, client.get_address(), exit_code=1) from None


def _request(client: JobSubmissionClient, request: dict[str, Any], report: Write) -> None:
    """Request a job, again for AGENT_SECONDS from a head that fails to begin it. Raises what Ray raises."""
    deadline, attempts = time.monotonic() + AGENT_SECONDS, 0
    while True:
        attempts += 1
        try:
            within(SEND_SECONDS, lambda: client.submit_job(**request))
            return
        except Exception as error:  # Ray raises several types, see client.connect.
            # An attempt whose answer was lost may have begun the job: its id is ours, and used only here.
            if attempts > 1 and _BEGUN in str(error) and request["submission_id"] in str(error):
                return
            if not _HEAD_FAILED.search(str(error)) or time.monotonic() >= deadline:
                raise
            reason = NO_AGENT if NO_AGENT in str(error) else cause_line(error)
        if attempts == 1:
            report(f"the cluster cannot begin jobs yet ({reason}); trying for up to {AGENT_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)
