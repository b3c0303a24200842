"""A copy of the process that imports: how it answers, and how it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_dist.launch.preload.wire import pack_answer, pack_error, send

PR_SET_PDEATHSIG = 1
OOM_FILE = Path("/proc/self/oom_score_adj")
Function = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass
class Child:
    """A rank: its process, and the connection to the client that waits for it."""

    pid: int
    connection: socket.socket


def standing() -> dict[str, int]:
    """Return how the system treats this process: its place behind others for a CPU, and before them where memory ends."""
    found = {"nice": os.getpriority(os.PRIO_PROCESS, 0)}
    with suppress(OSError, ValueError):  # only Linux has it
        found["oom_score_adj"] = int(OOM_FILE.read_text())
    return found


def stand_as(request: dict[str, Any]) -> None:
    """Take the standing of the client, which Ray has given it: a copy has that of the process that imports."""
    with suppress(OSError):  # Only root can go up.
        os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
    with suppress(OSError, KeyError):
        OOM_FILE.write_text(str(request["oom_score_adj"]))


def has_ended(pid: int) -> bool:
    """Report whether a child has ended; its exit status can still be read."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def end_with_parent(sign: int = signal.SIGKILL) -> None:
    """Let the system send this process a signal when its parent, which watches over it, has ended; 0: none any more."""
    parent = os.getppid()
    with suppress(OSError, AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, sign)
    if os.getppid() != parent:
        os._exit(1)


def answer(function: Function, orders: dict[str, Any], connection: socket.socket) -> int:
    """Send what the function returns or raises; return the exit code."""
    try:
        outcome = function(orders)
        message = pack_answer(outcome)
    except BaseException as error:
        send(connection, pack_error(error))
        return 1
    send(connection, message)
    return 0 if outcome.get("finished") else 1
