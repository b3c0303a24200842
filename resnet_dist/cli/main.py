"""Run a command, print the error that ended it, and exit with its code."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, NoReturn

import typer

from resnet_dist import __version__
from resnet_dist.cli.options import err, out
from resnet_dist.config import DEFAULT_WORKERS
from resnet_dist.errors import INTERRUPTED_EXIT_CODE, AlreadyReported, ExplainedError, UserError
from resnet_dist.signal_at_start import command_begins
from resnet_dist.system.command import (
    TRAINING_THREAD,
    is_main_process,
    started_by_torchrun,
    task_launcher,
)
from resnet_dist.system.memory import collect_rarely
from resnet_dist.system.redact import RedactingFormatter
from resnet_dist.system.signals import (
    EXIT_SECONDS,
    SECOND_EXIT_SECONDS,
    ExitTimer,
    exit_at_next_signal,
    exit_now,
    handle_signals,
    limit_exit,
)
from resnet_dist.system.streams import lost_result, set_end, take_streams

# Time for rank 0 to report a mistake: torchrun ends the other ranks of a node as soon as one has exited.
RANK_0_SECONDS = 30.0
HELP_OPTIONS = frozenset({"--help", "-h"})
_EMPTY_VALUE = re.compile(r"--[a-z-]+=")


def main() -> NoReturn:
    """Run the command line and end the process."""
    collect_rarely()
    take_streams()
    command_begins()
    code = run_command()
    if code == INTERRUPTED_EXIT_CODE:
        exit_at_next_signal()
    if code == 0 and (failure := lost_result()) is not None:
        err.print(f"error: the result could not be written to stdout ({failure.strerror})")
        code = 1
    # One sentence names a mistake, and an interruption ends with the line that resumes: no log is named beside them.
    is_plain = code in (2, INTERRUPTED_EXIT_CODE) or not is_main_process()
    set_end("silent" if is_plain else "named")
    _exit_process(code)


def run_command() -> int:
    """Run the command line of `sys.argv` and return its exit code.

    A user's mistake is printed as one sentence, our own defects as a traceback.
    """
    handler = LogHandler()
    handler.setFormatter(RedactingFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # At INFO, MLflow logs every table of a new store.
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)
    # A job that is stopped gets SIGTERM, which is handled like Ctrl-C.
    timer = ExitTimer()
    with handle_signals(timer.interrupt):
        try:
            code = _run()
        except KeyboardInterrupt:  # The user interrupted while an error was being reported.
            code = INTERRUPTED_EXIT_CODE
        timer.cancel()
    return code


class LogHandler(logging.Handler):
    """Shows records of this package to the person, and writes those of libraries to the log."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.name.partition(".")[0] == "resnet_dist":
            err.print(text)
        else:
            print(f"{record.name}: {text}", file=sys.stderr)


def _run() -> int:
    """Run the command and return its exit code."""
    from resnet_dist.cli import app  # Here, because the package imports this module.

    is_main = is_main_process()
    try:
        if HELP_OPTIONS.isdisjoint(sys.argv):
            refuse_empty_words(sys.argv[1:])
            _prepare()
            is_main = is_main_process()  # The variables of a torchrun that has ended are gone.
        if is_main:
            app()  # Typer prints usage errors and raises SystemExit.
        return int(app(standalone_mode=False) or 0)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except UserError as error:
        if is_main or not _rank_0_reported():
            err.print(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        if is_main:
            err.print("interrupted before the command began")
        return INTERRUPTED_EXIT_CODE
    except Exception as error:
        return _report_error(error)


def refuse_empty_words(words: Sequence[str]) -> None:
    """Raise UserError for an empty argument: nothing takes one, and as a folder it would be the working folder."""
    for before, word in pairwise(["", *words]):
        if not word or _EMPTY_VALUE.fullmatch(word):
            # An option before it may have no value, as --local; other words before it may have a password.
            is_option = before.startswith("-") and "=" not in before
            named = word.rstrip("=") or (f"the word after {before}" if is_option else "an argument")
            raise UserError(
                f"{named} is empty, as a variable of the shell that is not set; give a value, or leave it out"
            )


def _prepare() -> None:
    """Prepare the environment of this process, and report what a person should know of it."""
    # Here, because --help needs none of it.
    from resnet_dist.system.environment.prepare import prepare_command

    _print_once(prepare_command())


def _print_once(lines: list[str]) -> None:
    if is_main_process():
        for line in lines:
            err.print(line)


def _report_error(error: Exception) -> int:
    """Print the error that ended a command and return the exit code."""
    if isinstance(error, ExplainedError):
        if not isinstance(error, AlreadyReported):
            err.print(f"error: {error}")
        return error.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG and error.filename:
        err.print(f"error: {os.fsdecode(error.filename)[:80]!r}…: {error.strerror}")
        return UserError.exit_code
    if (sentence := _limit_behind(error)) is not None:
        err.print(f"error: {sentence}")
        return 1
    if not is_main_process() and isinstance(code := getattr(error, "exit_code", None), int):
        _rank_0_reported()
        return code  # A mistake in the flags, which rank 0 reports.
    err.print("".join(traceback.format_exception(error)), end="")
    set_end("tail")
    return 1


def _limit_behind(error: Exception) -> str | None:
    from resnet_dist.system.environment.explain import limit_behind  # Here, because no other case needs it.

    return limit_behind(error)


def _rank_0_reported() -> bool:
    """Wait for torchrun to end this rank, and return True if it does.

    Rank 0 mostly finds the same mistake and reports it, unless this rank exits first: torchrun would then end
    rank 0 before its report. False after `RANK_0_SECONDS`: only this node has the mistake.
    """
    try:
        time.sleep(RANK_0_SECONDS)
    except KeyboardInterrupt:
        return True
    return False


def _exit_process(code: int) -> NoReturn:
    """Exit with `code`, and at once where a training thread is alive, which may hang in a collective forever."""
    if any(thread.name == TRAINING_THREAD for thread in threading.enumerate()):
        exit_now(code)
    if code:
        # A transfer may hang in a driver: Python would wait for its thread.
        limit_exit(SECOND_EXIT_SECONDS if code == INTERRUPTED_EXIT_CODE else EXIT_SECONDS, code)
    sys.exit(code)


def show_version(asked: bool) -> None:
    """Print the version of this package and end the command."""
    if asked:
        out.print(f"resnet-dist {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
]


def begin(context: typer.Context, version: Version = False) -> None:
    check_launcher(context)


def check_launcher(context: typer.Context) -> None:
    """Raise UserError under torchrun for a command other than `train`: torchrun starts it once per rank."""
    command = context.invoked_subcommand
    if not started_by_torchrun() or command in (None, "train"):
        return
    raise UserError(f"torchrun would {command} once per rank; only train supports it: leave torchrun out")


def check_single_start(address: str | None) -> None:
    """Raise UserError where srun or mpirun has started this command several times, each of which would be a run.

    With the address of a cluster it is one driver of many tasks, as `ray symmetric-run` starts it.
    """
    launcher = None if address or os.environ.get("RAY_ADDRESS") else task_launcher()
    if launcher is not None:
        name, count = launcher
        raise UserError(
            f"{name} has started this command {count} times, which would train {count} separate runs; start one task, "
            "or torchrun with its ranks: torchrun --nproc-per-node N -m resnet_dist train …"
        )


def check_machine(*, local: bool, address: str | None, workers: int | None, gpu: bool | None) -> None:
    """Raise UserError where this machine, or its shell, does not allow the ranks that a command is about to start.

    What it mends itself is reported.
    """
    from resnet_dist.system.environment.prepare import Ranks, prepare_training

    if started_by_torchrun():
        ranks = Ranks.TORCHRUN
    elif local:
        ranks = Ranks.HERE
    else:
        ranks = Ranks.CLUSTER if address or os.environ.get("RAY_ADDRESS") else Ranks.RAY_HERE
    _print_once(prepare_training(ranks, num_workers=workers or DEFAULT_WORKERS, gpu=gpu))


def exit_with_message(message: str) -> Callable[[int], NoReturn]:
    """Return a handler for `handle_signals` around large imports: it prints `message` and exits with 130 at once.

    An exception during the import of torch would leave it half imported.
    """

    def leave(count: int) -> NoReturn:
        if is_main_process():
            err.print(message)
        exit_now(INTERRUPTED_EXIT_CODE)

    return leave
