"""Functions that a rank process of the tests calls; they import little."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from resnet_dist.launch.preload.copies import standing


class Odd(Exception):
    """An exception that cannot be unpacked: its class takes two arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def act(orders: dict[str, Any]) -> dict[str, Any]:
    """Do as ordered, as a rank would."""
    print(orders.get("say", ""), flush=True)
    match orders.get("end"):
        case "raise":
            raise ValueError("a shape")
        case "raise oddly":
            raise Odd("an odd", "error")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "leave":
            os._exit(7)
        case "hang":
            Path(orders["sign"]).write_text(str(os.getpid()))
            time.sleep(600)
    return {
        "finished": orders.get("finished", False),
        "pid": os.getpid(),
        "parent": os.getppid(),
        "variable": os.environ.get("PRELOAD_TEST"),
        "folder": str(Path.cwd()),
        "standing": standing(),
    }
