"""The variables of torchrun: those that something has left behind, and the address where its ranks meet."""

from __future__ import annotations

import os
import socket
import threading
import time

from resnet_dist.errors import UserError
from resnet_dist.system.command import TORCHRUN_VARIABLE, drop_stray_variables, started_by_torchrun

CONNECT_SECONDS = 5.0
# Ranks on several hosts try this long: a network may be late.
TOTAL_SECONDS = 20.0
PAUSE_SECONDS = 1.0


def check_torchrun() -> list[str]:
    """Drop the variables of a torchrun that did not start this process or has ended; find the one that did.

    Raises UserError where the ranks of several hosts cannot meet: without this they would wait for minutes.
    """
    if not started_by_torchrun():
        stray = drop_stray_variables()
        reason = "torchrun did not start this process"
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or (problem := _problem()) is None:
        return []  # Otherwise rank 0 is what the others wait for.
    elif os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise UserError(
            f"the ranks meet at {_where()} (torchrun's MASTER_ADDR and MASTER_PORT), which {socket.gethostname()} cannot "
            f"reach ({problem}): start torchrun on every node with --local-addr and an address of that node that the others can reach"
        )
    else:
        del os.environ[TORCHRUN_VARIABLE]
        stray = [TORCHRUN_VARIABLE, *drop_stray_variables()]
        reason = "the torchrun that they name has ended"
    return [f"ignored: {', '.join(stray)} in the environment, since {reason}"] if stray else []


def _problem() -> OSError | None:
    """Return the reason why torchrun's store does not answer; None where it does."""
    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    deadline = time.monotonic() + (TOTAL_SECONDS if several else 0)
    while (error := _error_of_connection(os.environ["MASTER_ADDR"])) is not None:
        if time.monotonic() >= deadline:
            return error
        threading.Event().wait(PAUSE_SECONDS)
    return None


def _error_of_connection(host: str) -> OSError | None:
    try:
        socket.create_connection((host, int(os.environ["MASTER_PORT"])), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return error
    return None


def _where() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
