"""Explain the failure of a tracker in one sentence; tell a person's mistake from an outage."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from http import HTTPStatus

from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from resnet_dist.errors import UserError
from resnet_dist.system.redact import redact
from resnet_dist.tracking.store import is_database

PROBE_SECONDS = 4
MAX_REASON = 200  # characters; a proxy answers with whole pages
_DENIED_BY_DATABASE = re.compile(
    r"(?i)password authentication failed|access denied|login failed|no password supplied"
)
_CAUSES = (
    (r"NameResolutionError|Name or service not known|getaddrinfo", "its host has no address"),
    (r"Connection refused", "connection refused"),
    (r"(?i)timed? ?out|timeout", "no answer in time"),
    (r"SSLError|CERTIFICATE_VERIFY_FAILED", "its certificate is not accepted"),
    (r"No route to host|Network is unreachable", "no route to its host"),
    (r"(?i)RemoteDisconnected|Connection aborted|reset by peer", "it closed the connection"),
    (r"database is locked", "another process keeps the database locked"),
    (r"disk I/O error|database or disk is full", "its file cannot be written"),
)


@dataclass(frozen=True)
class Failure:
    """The reason why a store cannot be used, without a password."""

    reason: str
    is_mistake: bool  # A person must act: waiting does not help.


def explain(error: BaseException, uri: str) -> Failure:
    """Return what an error of the store `uri` means; a server is asked once more, in seconds, what it answers."""
    if isinstance(error, UserError):
        return Failure(str(error), is_mistake=True)
    if uri.startswith(("http://", "https://")) and isinstance(error, MlflowException):
        denied = error.get_http_status_code() in (401, 403)
        return _answer_of(uri) or Failure(_shortened(error), is_mistake=denied)
    denied = is_database(uri) and _DENIED_BY_DATABASE.search(str(error)) is not None
    return Failure(_shortened(error), is_mistake=denied)


def _answer_of(uri: str) -> Failure | None:
    """Return what is wrong with the answers of a server; None where it answers as MLflow does."""
    try:
        answer = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "GET",
            max_retries=0,
            timeout=PROBE_SECONDS,
            raise_on_status=False,
            params={"max_results": 1},
        )
    except Exception as error:  # A client may raise any type.
        return Failure(_shortened(error), is_mistake=False)
    status = answer.status_code
    if status in (401, 403):
        return Failure(
            f"it answers {_status(status)}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN, to those of a user who may write there",
            is_mistake=True,
        )
    if status != 200:
        where = "; is there more to the address, such as a path?" if status == 404 else ""
        return Failure(f"it answers {_status(status)}{where}", is_mistake=False)
    try:
        json.loads(answer.text or "{}")
    except ValueError:
        return Failure("it answers with a page, as a proxy or a login does, not as MLflow", is_mistake=False)
    return None


def _status(code: int) -> str:
    try:
        return f"{code} {HTTPStatus(code).phrase}"
    except ValueError:
        return str(code)


def _shortened(error: BaseException) -> str:
    """Return the cause of an error where it is a well-known one, else the beginning of its first line."""
    text = str(error)
    for pattern, cause in _CAUSES:
        if re.search(pattern, text):
            return cause
    line = redact(next((line.strip() for line in text.splitlines() if line.strip()), ""))
    name = "" if isinstance(error, MlflowException) else type(error).__name__
    short = line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]}…"
    return ": ".join(part for part in (name, short) if part)


def lacks_endpoint(error: MlflowException) -> bool:
    """Report whether a server does not know what was asked: MLflow 2, Azure ML, or a proxy in front of one."""
    # RESOURCE_DOES_NOT_EXIST would be the run's.
    return error.get_http_status_code() in (404, 405, 501) and error.error_code != "RESOURCE_DOES_NOT_EXIST"
