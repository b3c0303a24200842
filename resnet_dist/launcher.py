"""Who started this process: a person, torchrun as one of several ranks, or Ray Jobs. Knows no torch."""

from __future__ import annotations

import os
import shlex
import sys

DEFAULT_WORKERS = 2  # ranks under Ray
TRAINING_THREAD = "train"  # may hang for ever in a collective: the process is then left without it
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COMMAND_VARIABLE = "RESNET_DIST_COMMAND"  # of a submitted job: as the person typed it


def started_by_torchrun() -> bool:
    return all(name in os.environ for name in VARIABLES)


def is_main_process() -> bool:
    """Whether this process speaks to the person: all do, but for the other ranks of torchrun."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def resume_line(name: str) -> str:
    """The command as it was typed, with the name of its run."""
    words, skip = [], False
    for word in shlex.split(os.environ.get(COMMAND_VARIABLE) or command_line()):
        if skip or word in ("--name", "--resume") or word.startswith("--name="):
            skip = word == "--name"
            continue
        words.append(word)
    return shlex.join([*words, "--name", name])


def command_line() -> str:
    if not started_by_torchrun():
        return shlex.join(["resnet-dist", *sys.argv[1:]])
    ranks = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    return shlex.join(["torchrun", "--nproc-per-node", ranks, "-m", "resnet_dist", *sys.argv[1:]])
