"""Find out who started this process: a person, torchrun as one of several ranks, or Ray Jobs.

The command is quoted in messages as the person typed it.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from resnet_dist.system.redact import HIDDEN, redact

DEFAULT_OUTPUT = Path("output")
# The thread that trains. It may hang in a collective forever: the process must then exit without it.
TRAINING_THREAD = "train"
# torchrun sets these for every rank. Other launchers, notebooks and debuggers leave most of them behind in a shell, where
# they mean nothing; the last one is torchrun's own.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"
# Libraries read these, too, when torchrun has not set them.
OTHER_VARIABLES = (
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "NODE_RANK",
)
# Launchers that start a command once per task, which would make as many runs: the variables with the number of tasks,
# of which the first that is set counts, and one that shows that the launcher started this very process.
TASK_LAUNCHERS = (
    ("srun", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_STEP_ID"),
    ("mpirun", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_RANK"),
    ("mpirun", ("MV2_COMM_WORLD_SIZE",), "MV2_COMM_WORLD_RANK"),
    ("mpirun", ("PMI_SIZE",), "PMI_RANK"),
    ("jsrun", ("JSM_NAMESPACE_SIZE",), "JSM_NAMESPACE_RANK"),
    ("flux run", ("FLUX_JOB_SIZE",), "FLUX_TASK_RANK"),
    ("horovodrun", ("HOROVOD_SIZE",), "HOROVOD_RANK"),
)
# Slurm's steps from this number on are a shell of salloc or a script of sbatch, which start once.
FIRST_SPECIAL_STEP = 0xFFFFFFF0
# torchrun's options that a rank can read: option, variable, and the value that needs no option.
TORCHRUN_OPTIONS = (
    ("--nnodes", "GROUP_WORLD_SIZE", "1"),
    ("--nproc-per-node", "LOCAL_WORLD_SIZE", ""),
    ("--max-restarts", "TORCHELASTIC_MAX_RESTARTS", "0"),
)
# Set for a submitted job: the `submit` command as the person typed it.
COMMAND_VARIABLE = "RESNET_DIST_COMMAND"
CONTINUES = "this continues it:"  # the words before the command that continues a run


def started_by_torchrun() -> bool:
    """Report whether torchrun started this process as one of its ranks."""
    return all(name in os.environ for name in (*VARIABLES, TORCHRUN_VARIABLE))


def drop_stray_variables() -> list[str]:
    """Remove torchrun's variables from the environment unless torchrun started this process; return those to report.

    Libraries would read them, here and in the ranks.
    """
    if started_by_torchrun():
        return []
    stray = [name for name in VARIABLES if name in os.environ]
    for name in (*stray, *OTHER_VARIABLES):
        os.environ.pop(name, None)
    return stray


def task_launcher() -> tuple[str, int] | None:
    """Return the launcher that started this command several times without torchrun, and how often; None without one.

    A command that a person typed runs once: launchers connect no terminal to the tasks that they start.
    """
    if started_by_torchrun() or os.isatty(0):
        return None
    for launcher, counts, mark in TASK_LAUNCHERS:
        mine, number = os.environ.get(mark, ""), next(filter(None, map(os.environ.get, counts)), "")
        special = launcher == "srun" and mine.isdecimal() and int(mine) >= FIRST_SPECIAL_STEP
        if mine and not special and number.isdecimal() and int(number) > 1:
            return launcher, int(number)
    return None


def is_main_process() -> bool:
    """Report whether this process prints messages: every process but ranks 1, 2, … of torchrun."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def resume_advice(name: str) -> str:
    """Return the line that names the command which resumes run `name`: as it was typed, with that name."""
    submitted = os.environ.get(COMMAND_VARIABLE)
    line = shown(named(shlex.split(submitted) if submitted else _typed(), name))
    if started_by_torchrun() and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return (
            "this continues it on every node, with torchrun's options for the rendezvous (--rdzv-… or --node-rank "
            f"and --master-…) as they were:\n  {line}"
        )
    return f"{CONTINUES}\n  {line}"


def named(words: Iterable[str], name: str) -> list[str]:
    """Return the words of a command that starts a run, as one that continues the run `name`; studies and sweeps name their own."""
    typed = list(words)
    if typed[1:2] in (["study"], ["sweep"]):
        return typed
    arguments, skip = [], False
    for word in typed:
        if skip or word in ("--name", "--resume") or word.startswith("--name="):
            skip = word == "--name"  # The value of --name is a word of its own: skip it too.
            continue
        arguments.append(word)
    return [*arguments, "--name", name]


def quoted(text: str) -> str:
    """Return one argument as a shell reads it. Line breaks, and bytes that are not UTF-8, get their escapes."""
    if text.isprintable():
        return shlex.quote(text)
    signs = (sign if sign.isprintable() else _escaped(sign) for sign in text)
    return "$'" + "".join("\\" + sign if sign in "\\'" else sign for sign in signs) + "'"


def _escaped(sign: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(sign))


def joined(arguments: Iterable[str]) -> str:
    return " ".join(map(quoted, arguments))


def shown(arguments: Iterable[str]) -> str:
    """Return a command for a person to read: passwords are hidden before the words get quotes, which would split them.

    Where one is hidden, the next line names who has it.
    """
    words = [*arguments]
    safe = [*map(redact, words)]
    hint = (
        ""
        if safe == words
        else f"\n  ({HIDDEN} hides a password that no file keeps: type it again in its place)"
    )
    return joined(safe) + hint


def sync_advice(name: str, output: str) -> str:
    """Return the words that name the command which sends what MLflow did not get of run `name`."""
    there = "" if output == str(DEFAULT_OUTPUT.absolute()) else f" --output {quoted(output)}"
    return f"this sends it: resnet-dist sync {name}{there}"


def command_line() -> str:
    """Return the command as it was typed, for a person, with those of torchrun's own options that a rank can read."""
    return shown(_typed())


def typed_line() -> str:
    """Return the command as it was typed, with its passwords."""
    return joined(_typed())


def _typed() -> list[str]:
    if not started_by_torchrun():
        return ["resnet-dist", *sys.argv[1:]]
    options = []
    for option, variable, default in TORCHRUN_OPTIONS:
        if (value := os.environ.get(variable, default)) != default:
            options += [option, value]
    return ["torchrun", *options, "-m", "resnet_dist", *sys.argv[1:]]
