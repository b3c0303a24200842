"""Who started this process: a person, torchrun as one of several ranks, or Ray Jobs. Knows no torch."""

from __future__ import annotations

import os
import shlex
import sys

DEFAULT_WORKERS = 2  # ranks under Ray
TRAINING_THREAD = "train"  # may hang for ever in a collective: the process is then left without it
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN_OPTIONS = (  # as typed, where a rank sees them, without the option
    ("--nnodes", "GROUP_WORLD_SIZE", "1"),
    ("--nproc-per-node", "LOCAL_WORLD_SIZE", ""),
    ("--max-restarts", "TORCHELASTIC_MAX_RESTARTS", "0"),
)
COMMAND_VARIABLE = "RESNET_DIST_COMMAND"  # of a submitted job: as the person typed it


def started_by_torchrun() -> bool:
    return all(name in os.environ for name in VARIABLES)


def is_main_process() -> bool:
    """Whether this process speaks to the person: all do, but for the other ranks of torchrun."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def resume_advice(name: str) -> str:
    """How run `name` goes on: the command as it was typed, with that name."""
    words, skip = [], False
    for word in shlex.split(os.environ.get(COMMAND_VARIABLE) or command_line()):
        if skip or word in ("--name", "--resume") or word.startswith("--name="):
            skip = word == "--name"
            continue
        words.append(word)
    line = shlex.join([*words, "--name", name])
    if started_by_torchrun() and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return (
            "this continues it on every node, with torchrun's options for the rendezvous (--rdzv-… or --node-rank "
            f"and --master-…) as they were:\n  {line}"
        )
    return f"this continues it:\n  {line}"


def command_line() -> str:
    """The command as it was typed; of torchrun's own options, those that a rank can see."""
    if not started_by_torchrun():
        return shlex.join(["resnet-dist", *sys.argv[1:]])
    options = []
    for option, variable, default in TORCHRUN_OPTIONS:
        if (value := os.environ.get(variable, default)) != default:
            options += [option, value]
    return shlex.join(["torchrun", *options, "-m", "resnet_dist", *sys.argv[1:]])
