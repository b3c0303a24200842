"""Count the CPUs that this process may use."""

from __future__ import annotations

import os


def cpu_count() -> int:
    """Return the size of this process's affinity mask; the number of all CPUs where there is none (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
