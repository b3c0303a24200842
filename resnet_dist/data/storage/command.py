"""Shards that are the output of a shell command: `pipe:COMMAND`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from resnet_dist.data.storage.transfer import POLL_SECONDS, size_of
from resnet_dist.data.storage.urls import COMMAND, shown
from resnet_dist.errors import StorageError
from resnet_dist.system.redact import redact


def run_command(url: str, partial: Path, timeout_seconds: float, closed: threading.Event) -> None:
    """Run `pipe:COMMAND` in a shell and write its output to `partial`.

    Raises StorageError where the command fails, or writes nothing for `timeout_seconds`, or when `closed` is set.
    """
    with partial.open("wb") as target, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            url.removeprefix(COMMAND), shell=True, stdout=target, stderr=errors, start_new_session=True
        )
        size, since, problem = -1, time.monotonic(), None
        while problem is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
                break
            if size_of(partial) != size:
                size, since = size_of(partial), time.monotonic()
            if time.monotonic() - since > timeout_seconds:
                problem = f"wrote nothing for {timeout_seconds:.0f} s"
            elif closed.is_set():
                problem = "given up, the loader was closed"
        if problem is not None:
            os.killpg(process.pid, signal.SIGKILL)  # the shell and its children
            process.wait()
        elif process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            problem = f"ended with {process.returncode}: {redact(lines[-1]) if lines else 'no message'}"
    if problem is not None:
        partial.unlink()
        raise StorageError(f"{shown(url)}: {problem}")
