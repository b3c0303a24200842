"""Find out who started this process: a person, torchrun as one of several ranks, or Ray Jobs.

The command is quoted in messages as the person typed it.
"""

from __future__ import annotations

import os
import shlex
import sys

# The thread that trains. It may hang in a collective forever: the process must then exit without it.
TRAINING_THREAD = "train"
# torchrun sets these for every rank. Other launchers, notebooks and debuggers leave most of them behind in a shell, where
# they mean nothing; the last one is torchrun's own.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"
# Launchers that start a command once per task, which would make as many runs: the number of tasks, and what shows that
# the launcher started this very process.
TASK_LAUNCHERS = (
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"),
    ("srun", "SLURM_NTASKS", "SLURM_STEP_ID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
)
# torchrun's options that a rank can read: option, variable, and the value that needs no option.
TORCHRUN_OPTIONS = (
    ("--nnodes", "GROUP_WORLD_SIZE", "1"),
    ("--nproc-per-node", "LOCAL_WORLD_SIZE", ""),
    ("--max-restarts", "TORCHELASTIC_MAX_RESTARTS", "0"),
)
# Set for a submitted job: the `submit` command as the person typed it.
COMMAND_VARIABLE = "RESNET_DIST_COMMAND"


def started_by_torchrun() -> bool:
    """Report whether torchrun started this process as one of its ranks."""
    return all(name in os.environ for name in (*VARIABLES, TORCHRUN_VARIABLE))


def stray_variables() -> list[str]:
    """Return torchrun's variables that are set although torchrun did not start this process."""
    return [] if started_by_torchrun() else [name for name in VARIABLES if name in os.environ]


def task_launcher() -> tuple[str, int] | None:
    """Return the launcher that started this command several times without torchrun, and how often; None without one."""
    if started_by_torchrun():
        return None
    for launcher, count, rank in TASK_LAUNCHERS:
        number = os.environ.get(count, "")
        if rank in os.environ and number.isdecimal() and int(number) > 1:
            return launcher, int(number)
    return None


def is_main_process() -> bool:
    """Report whether this process prints messages: every process but ranks 1, 2, … of torchrun."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def resume_advice(name: str) -> str:
    """Return the line that names the command which resumes run `name`: as it was typed, with that name."""
    arguments, skip = [], False
    for argument in shlex.split(os.environ.get(COMMAND_VARIABLE) or command_line()):
        if skip or argument in ("--name", "--resume") or argument.startswith("--name="):
            skip = argument == "--name"  # The value of --name is an argument of its own: skip it too.
            continue
        arguments.append(argument)
    line = shlex.join([*arguments, "--name", name])
    if started_by_torchrun() and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return (
            "this continues it on every node, with torchrun's options for the rendezvous (--rdzv-… or --node-rank "
            f"and --master-…) as they were:\n  {line}"
        )
    return f"this continues it:\n  {line}"


def command_line() -> str:
    """Return the command as it was typed, with those of torchrun's own options that a rank can read."""
    if not started_by_torchrun():
        return shlex.join(["resnet-dist", *sys.argv[1:]])
    options = []
    for option, variable, default in TORCHRUN_OPTIONS:
        if (value := os.environ.get(variable, default)) != default:
            options += [option, value]
    return shlex.join(["torchrun", *options, "-m", "resnet_dist", *sys.argv[1:]])
