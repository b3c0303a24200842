"""Turn what Ray Train raises into the error of the rank that failed first, and say whose fault it was.

A mistake of a person or a defect ends the run. A process, node or network that went away is RanksLost: the driver
starts the ranks again.
"""

from __future__ import annotations

import re

from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from resnet_dist.errors import Diverged, RankFailed, RanksLost, Superseded, TrainingError, UserError
from resnet_dist.launch.rank import is_echo
from resnet_dist.runs.storage.protocol import Unreachable
from resnet_dist.train.watch.watchdog import Stalled

MAX_LINES = 10  # of a rank's own message that are shown; the details have the rest
# What Ray writes about a death, and what it means.
DEATHS = (
    ("running low on memory", "was killed because its node ran out of memory"),
    ("its node has died", "was lost with its node"),
    ("node was terminated", "was lost with its node"),
    ("worker process has died", "was killed or crashed"),
    ("unavailable", "cannot be reached"),
)


class NotPlaced(Exception):
    """The ranks have not begun: the cluster had no room for them after all."""


def explain(error: BaseException) -> Exception:
    """Return the error that ended an attempt, as a TrainingError, RankFailed, RanksLost or NotPlaced."""
    if isinstance(error, PreemptionError):
        return RanksLost(_preemption(error), str(error), preempted=True)
    if isinstance(error, ControllerError):
        return _controller_failure(error)
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        return _first_failure(error)
    return error if isinstance(error, Exception) else RankFailed(repr(error))


def _first_failure(error: WorkerGroupError) -> Exception:
    """Return the failure that caused the others: a mistake, then a defect, then a loss, then a broken connection."""
    failures = {rank: _unwrap(failure) for rank, failure in sorted(error.worker_failures.items())}
    for failure in failures.values():
        if isinstance(failure, (Stalled, Superseded, Unreachable)):
            return RanksLost(str(failure), str(error))
        if isinstance(failure, (TrainingError, UserError)):
            return (Diverged if isinstance(failure, Diverged) else TrainingError)(str(failure))
    for rank, failure in failures.items():
        if not _is_loss(failure) and not is_echo(failure):
            return RankFailed(f"rank {rank} failed: {_short(failure)}", str(error))
    lost = {rank: failure for rank, failure in failures.items() if _is_loss(failure)}
    if lost:
        texts = [f"rank {rank}{_place(failure)} {_death(failure)}" for rank, failure in lost.items()]
        preempted = any(error.preempted for error in map(_actor_error, lost.values()) if error is not None)
        return RanksLost("; ".join(texts), str(error), preempted=preempted)
    rank, failure = next(iter(failures.items()))
    return RanksLost(f"rank {rank} lost its connection to another one", str(error))


def _controller_failure(error: ControllerError) -> Exception:
    failure = error.controller_failure
    if isinstance(failure, WorkerGroupStartupTimeoutError):
        return NotPlaced(str(failure))
    if isinstance(failure, WorkerGroupStartupFailedError):
        cause = failure.__cause__ or failure
        where = _place(cause)
        return RanksLost(f"a rank was lost while the ranks were started{where}", str(error), begun=False)
    if is_echo(failure) or isinstance(failure, RayError):
        return RanksLost(f"the ranks could not be connected: {_short(failure)}", str(error), begun=False)
    return RankFailed(f"Ray Train could not run the ranks: {_short(failure)}", str(error))


def _is_loss(failure: BaseException) -> bool:
    return isinstance(
        failure,
        (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError, RayActorError, OutOfMemoryError),
    )


def _actor_error(failure: BaseException) -> RayActorError | None:
    cause = getattr(failure, "health_check_failure", failure)
    return cause if isinstance(cause, RayActorError) else None


def _death(failure: BaseException) -> str:
    actor_error = _actor_error(failure)
    if actor_error is not None and actor_error.preempted:
        return "was lost with its node, which was preempted"
    if isinstance(failure, WorkerHealthCheckTimeoutError):
        return "does not answer"
    text = str(failure)
    return next((meaning for phrase, meaning in DEATHS if phrase in text), f"was lost ({_short(failure)})")


def _place(failure: BaseException) -> str:
    """Return " on HOST (ADDRESS)" of a rank, as far as Ray's message names them."""
    text = str(failure)
    host = re.search(r"hostname='([^']+)'", text)
    address = re.search(r"node_ip='([^']+)'", text) or re.search(r"\bip: (\S+)", text)
    if host and address:
        return f" on {host[1]} ({address[1]})"
    return f" on {address[1]}" if address else ""


def _preemption(error: PreemptionError) -> str:
    ranks = ", ".join(map(str, error.preemption_info.preempted_ranks))
    return f"the nodes of ranks {ranks} were preempted"


def _short(failure: BaseException) -> str:
    """Return the type and the first lines of a message."""
    lines = str(failure).strip().splitlines() or [""]
    rest = [f"… and {len(lines) - MAX_LINES} more lines"] if len(lines) > MAX_LINES else []
    return f"{type(failure).__name__}: " + "\n".join([*lines[:MAX_LINES], *rest])


def _unwrap(error: BaseException) -> BaseException:
    """Return what the train function raised; each release of Ray keeps it in one of these attributes."""
    for name in ("_base_exc", "cause"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return _unwrap(inner)
    return error
