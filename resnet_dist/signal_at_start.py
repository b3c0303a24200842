"""Let Ctrl-C end a command that still imports with one line, where Python would print the stack of the import.

Imported by the package itself, before anything slow, and without effect in every process but that of a command.
"""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

LINE = b"interrupted before the command began\n"
EXIT_CODE = 130  # errors.INTERRUPTED_EXIT_CODE, which is not imported yet


def is_command(argv: list[str], original: list[str]) -> bool:
    """Report whether this process was started as `resnet-dist` or `python -m resnet_dist`, from `sys.argv` and `sys.orig_argv`.

    Another program may have `-m resnet_dist` among its own words, as pytest may; and a process that multiprocessing has
    started has the first word of its parent, but was not started with it.
    """
    first = argv[0] if argv else ""
    if first == "-m":  # Python's word for the module until it has found it.
        return ("-m", "resnet_dist") in zip(original, original[1:], strict=False)
    return os.path.basename(first) == "resnet-dist" and first in original


def _leave(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":  # of torchrun's ranks one prints
        with suppress(OSError):
            os.write(2, LINE)
    os._exit(EXIT_CODE)


def await_command() -> None:
    """End the process at an interruption until `command_begins`."""
    if is_command(sys.argv, sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, _leave)


def command_begins() -> None:
    """Give interruptions their usual meaning: the command handles them from here on."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


await_command()
