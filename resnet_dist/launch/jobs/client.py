"""Ray's client of the jobs of a cluster. It has no limit of time of its own, and many types of errors."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from typing import TypeVar

from resnet_dist.launch.on_ray.settings import ADDRESS_VARIABLE, set_defaults
from resnet_dist.launch.ray_cluster.address import DASHBOARD_VARIABLE
from resnet_dist.launch.ray_cluster.check import job_headers

set_defaults()

from ray.job_submission import JobSubmissionClient

from resnet_dist.errors import NO_ANSWER_EXIT_CODE, ExplainedError, UserError
from resnet_dist.system.limit import within

Answer = TypeVar("Answer")

# A head that is up answers in less; where a link is cut, no answer ever comes.
ANSWER_SECONDS = 20.0
_TRACEBACK = "Traceback (most recent call last)"
_ERRNO = re.compile(r"\[Errno -?\d+\] ([^'\")]+)")
_UNKNOWN_JOB = re.compile(r"status code 404\b.*does not exist", re.DOTALL)


class NoAnswer(ExplainedError):
    """A cluster that does not answer a request about its jobs."""

    exit_code = NO_ANSWER_EXIT_CODE


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the dashboard at `address`, as find_dashboard() returns it. Raises UserError."""
    for name in (
        "ray.dashboard.modules.dashboard_sdk",
        "ray._private.runtime_env.packaging",
        "ray.dashboard.modules.job.sdk",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)  # They log a line for every upload and connection.
    # Ray prefers these variables, where they are set, to the address that the person typed.
    for variable in (ADDRESS_VARIABLE, DASHBOARD_VARIABLE):
        os.environ.pop(variable, None)
    try:
        return JobSubmissionClient(address, headers=job_headers())
    except Exception as error:  # Ray raises RuntimeError, ConnectionError or an error of requests.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--address {address}: no Ray cluster answers there ({reason})") from None


def asked(client: JobSubmissionClient, call: Callable[[], Answer]) -> Answer:
    """Return what `call` asks of the cluster. Raises NoAnswer where it fails, or takes longer than ANSWER_SECONDS."""
    try:
        return within(ANSWER_SECONDS, call)
    except Exception as error:  # Ray raises several types, see connect.
        raise NoAnswer(
            f"--address {client.get_address()}: the cluster does not answer ({cause_line(error)})"
        ) from None


def last_lines(client: JobSubmissionClient, job: str, count: int) -> str:
    """Return the last lines of a job's log. Raises an error of several types, see `asked`."""
    # Ray's client has no method for the end of a log; its state API serves it.
    answer = client._do_request("GET", "/api/v0/logs/file", params={"submission_id": job, "lines": count})
    if answer.status_code != 200:
        raise RuntimeError(f"status code {answer.status_code}: {answer.text}")
    return str(answer.text)


def is_unknown_job(error: Exception) -> bool:
    """Report whether `error` is the answer of a head that does not know the job."""
    return _UNKNOWN_JOB.search(str(error)) is not None


def cause_line(error: Exception) -> str:
    """Return the line of an error's text that names its cause, or its type.

    It is the first, or the last of a traceback that the head sent as its answer. Of a connection that could not be
    made, it is the system's word, not the pools and tries around it.
    """
    if "Max retries exceeded" in str(error) and (named := _ERRNO.findall(str(error))):
        return str(named[-1])
    # Ray puts a full stop behind what the head sent, on a line of its own behind a traceback.
    lines = [line.strip() for line in str(error).splitlines() if line.strip(". \t")]
    if not lines:
        return type(error).__name__
    if not any(_TRACEBACK in line for line in lines):
        return lines[0]
    return f"{lines[0].split(_TRACEBACK)[0].rstrip(': ')}: {lines[-1]}"
