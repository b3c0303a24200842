"""The seconds from the cause of a start to its first step, by phase.

A mark is the time, in seconds since 1970, at which a phase ended. The driver's come first, then those of rank 0: where
the clocks of two machines differ, only the phase between them is wrong.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

BEGIN = "begin"  # the mark of the cause, before the first phase
ENDED, PLACED, PROCESSES, IMPORTS = "ranks ended", "placed", "processes", "imports"
CONNECTED, CHECKPOINT, DATA, STEP = "connected", "checkpoint", "data", "step"


def phases_of(marks: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each phase, in the order of the marks, of which the first is BEGIN.

    A mark before the one that precedes it (a process that was there already, another clock) makes a phase of 0 s.
    """
    phases = {}
    times = iter(marks.items())
    _, latest = next(times)
    for name, moment in times:
        phases[name] = round(max(0.0, moment - latest), 3)
        latest = max(latest, moment)
    return phases


def describe_start(attempt: int, phases: Mapping[str, float]) -> str:
    """Return the line about a start, such as "attempt 2: first step after 24.1 s (placed 0.4, …)"."""
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())
    return f"attempt {attempt}: first step after {sum(phases.values()):.1f} s ({parts})"


def process_start() -> float:
    """Return the time at which this process began; 0 where the machine does not record it."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
