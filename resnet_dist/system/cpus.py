"""How many CPUs this process may use."""

from __future__ import annotations

import os


def cpu_count() -> int:
    """The CPUs of this process's affinity mask; all of the machine's where the system has no such masks (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
