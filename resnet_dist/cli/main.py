"""Run a command, explain what ends it, and leave with its exit code."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import typer

from resnet_dist.cli.options import err
from resnet_dist.errors import AlreadyReported, ExplainedError, UserError
from resnet_dist.system.command import TRAINING_THREAD, is_main_process, started_by_torchrun
from resnet_dist.system.signals import handle_signals, raise_interrupt

RANK_0_SECONDS = (
    30.0  # that it has for its word, at most: torchrun ends the other ranks of a node as soon as one has left
)


def main() -> None:
    """The entry point: a person's mistake is one sentence, a traceback is for our own bugs."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)  # not each table of a new store
    with handle_signals(raise_interrupt):  # a job that is stopped gets SIGTERM: the same as Ctrl-C
        try:
            code = _run()
        except KeyboardInterrupt:  # while another end was being told
            code = 130
        _leave(code)


def _run() -> int:
    """Run the command; its exit code."""
    from resnet_dist.cli import app  # which imports this module

    speaks = is_main_process()
    try:
        if speaks:
            app()
        return int(app(standalone_mode=False) or 0)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except UserError as error:
        if speaks or not _rank_0_reported():
            err.print(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        if speaks:
            err.print("interrupted before the command began")
        return 130
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    """Print what ended a run; the exit code."""
    if isinstance(error, ExplainedError):
        if not isinstance(error, AlreadyReported):
            err.print(f"error: {error}")
        return error.exit_code
    if not is_main_process() and isinstance(code := getattr(error, "exit_code", None), int):
        _rank_0_reported()
        return code  # a mistake in the flags, which rank 0 explains
    traceback.print_exception(error)
    return 1


def _rank_0_reported() -> bool:
    """Whether rank 0, which mostly finds the same mistake, has said it: torchrun then ends this rank.

    Leaving first would have rank 0 ended before its word. A mistake that only this node has, it does not know of.
    """
    try:
        time.sleep(RANK_0_SECONDS)
    except KeyboardInterrupt:
        return True
    return False


def _leave(code: int) -> NoReturn:
    """End the process; at once where a training thread may hang in a collective for ever."""
    if any(thread.name == TRAINING_THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def only_train_under_torchrun(context: typer.Context) -> None:
    """torchrun starts a command once per rank: `train` alone makes one run of them. Raises UserError."""
    command = context.invoked_subcommand
    if not started_by_torchrun() or command in (None, "train"):
        return
    raise UserError(f"torchrun would {command} once per rank; only train is for it: leave torchrun out")


def exit_with_message(words: str) -> Callable[[int], NoReturn]:
    """For `handle_signals` around large imports: an exception in the middle of torch's leaves wreckage."""

    def leave(count: int) -> NoReturn:
        if is_main_process():
            err.print(words)
        sys.stdout.flush()
        os._exit(130)

    return leave
