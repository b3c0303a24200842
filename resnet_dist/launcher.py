"""Who started this process: a person, or torchrun as one of several ranks. Knows no torch."""

from __future__ import annotations

import os

TRAINING_THREAD = "train"  # may hang for ever in a collective: the process is then left without it
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started_by_torchrun() -> bool:
    return all(name in os.environ for name in VARIABLES)


def is_main_process() -> bool:
    """Whether this process speaks to the person: all do, but for the other ranks of torchrun."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"
