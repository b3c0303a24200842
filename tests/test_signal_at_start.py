"""An interruption while a command imports: one line, where Python prints the stack of the import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from resnet_dist.signal_at_start import is_command
from tests.paths import ROOT

# The tests may run in the background of a script, whose shell ignores SIGINT.
HEEDED = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
INTERRUPTED = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"


@pytest.mark.parametrize(
    ("argv", "original", "is_one"),
    [
        (["/env/bin/resnet-dist", "ui"], ["python", "/env/bin/resnet-dist", "ui"], True),
        (["-m", "ui"], ["python", "-P", "-m", "resnet_dist", "ui"], True),
        (["-m"], ["python", "-m", "resnet_dist.launch.preload.server"], False),
        (["/env/bin/resnet-dist"], ["python", "-c", "spawn_main()", "--multiprocessing-fork"], False),
        (["/env/bin/resnet-dist"], ["python", "-c", "from multiprocessing.forkserver import main"], False),
        (["/env/bin/pytest"], ["python", "/env/bin/pytest", "-m", "resnet_dist"], False),
        (["train.py"], ["python", "train.py"], False),
        ([""], ["python"], False),
    ],
)
def test_the_processes_of_a_command(argv: list[str], original: list[str], is_one: bool) -> None:
    assert is_command(argv, original) == is_one


@pytest.mark.parametrize(
    ("name", "last", "code", "lines"),
    [
        ("resnet-dist", INTERRUPTED, 130, ["interrupted before the command began"]),
        ("resnet-dist", f"resnet_dist.signal_at_start.command_begins()\n{INTERRUPTED}", -2, None),
        ("mine.py", INTERRUPTED, -2, None),
    ],
    ids=["imports", "begins", "library"],
)
def test_a_command_that_imports_ends_with_one_line(
    name: str, last: str, code: int, lines: list[str] | None
) -> None:
    """A command that has begun, and another program, get KeyboardInterrupt as usual."""
    words = f"sys.argv[0] = {name!r}\nsys.orig_argv = ['python', {name!r}]"
    program = f"{HEEDED}import sys\n{words}\nimport resnet_dist\n{last}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines() == lines if lines else "KeyboardInterrupt" in done.stderr
