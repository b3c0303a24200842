"""Our lines reach the person, those of libraries the log, and nothing is lost, whatever ends the command."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_dist.system import log_writer
from tests.paths import ROOT

PROGRAM = """
import os, signal, subprocess, sys, warnings
from pathlib import Path
from resnet_dist.system import streams
from resnet_dist.cli.options import err, out
ends = {
    "abort": os.abort,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(7),  # as Ray's C++ does where it has lost the cluster
    "raise": lambda: 1 / 0,
    "named": lambda: streams.set_end("named"),
    "tail": lambda: streams.set_end("tail"),
    "silent": lambda: streams.set_end("silent"),
}
streams.take_streams()
streams.divert()
out.print("ours on stdout")
err.print("ours on stderr")
print("library 1 http://me:secret@host/")
print("library 2", file=sys.stderr)
os.write(2, b"library 3\\n")
subprocess.run(["sh", "-c", "echo library 4 >&2"])
warnings.warn("library 5")
os.write(2, b"\\r10 %\\r20 %\\n\\nno line end")
if len(sys.argv) > 2:
    streams.log_to(Path(sys.argv[2]))
ends[sys.argv[1]]()
out.print("the end")
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    given = {"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": 100, "check": False}
    return subprocess.run(command, **(given | options))  # type: ignore[call-overload, no-any-return]


LINES = ["library 1 http://***@host/", "library 2", "library 3", "library 4", "20 %", "no line end"]


def lines_of(log: Path) -> list[str]:
    """Return the lines without their times, and without the two of the warning, which quotes its line of code."""
    stamped = [
        re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (.*)", line)
        for line in log.read_text().splitlines()
    ]
    texts = [match[1] for match in stamped if match is not None]
    assert len(texts) == len(stamped)
    assert sum("library 5" in text for text in texts) in (1, 2)
    return [text for text in texts if "library 5" not in text]


@pytest.mark.parametrize("end", ["named", "silent", "tail"])
def test_the_end_of_a_command_names_its_log_once(end: str, tmp_path: Path) -> None:
    done = run(end, "log.txt", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "ours on stdout\nthe end\n")
    assert lines_of(tmp_path / "log.txt") == LINES
    expected = {"named": ["details: log.txt"], "silent": []}
    said = done.stderr.splitlines()
    assert said[0] == "ours on stderr"
    if end == "tail":
        assert said[1] == "  library 1 http://***@host/"
        assert said[-2:] == ["  no line end", "details: log.txt"]
    else:
        assert said[1:] == expected[end]


@pytest.mark.parametrize("end", ["abort", "kill", "exit", "raise"])
def test_a_fatal_error_shows_the_last_lines(end: str, tmp_path: Path) -> None:
    done = run(end, "log.txt", cwd=tmp_path)
    codes = {
        "abort": -signal.SIGABRT,
        "segfault": -signal.SIGSEGV,
        "kill": -signal.SIGKILL,
        "exit": 7,
        "raise": 1,
    }
    assert done.returncode == codes[end]
    assert (
        "\nerror: the command was killed, or a fatal error of a library ended it; the last lines:\n"
        in done.stderr
    )
    assert "\n  library 3\n" in done.stderr
    assert done.stderr.endswith("details: log.txt\n")
    assert ("Fatal Python error: " in done.stderr) == (end == "abort")
    if end == "raise":
        assert "  ZeroDivisionError: division by zero\n" in done.stderr
    else:
        assert lines_of(tmp_path / "log.txt") == LINES


def test_without_a_run_the_log_is_a_temporary_file(tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"TMPDIR": str(tmp_path)}
    done = run("silent", env=environment)
    assert (done.stderr, list(tmp_path.iterdir())) == ("ours on stderr\n", [])
    done = run("named", env=environment)
    (log,) = tmp_path.iterdir()
    assert done.stderr == f"ours on stderr\ndetails: {log}\n"
    assert lines_of(log) == LINES


def test_a_log_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    done = run("named", "gone/log.txt", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "ours on stdout\nthe end\n")
    assert list(tmp_path.iterdir()) == []


def in_shell(
    redirect: str, cwd: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the program by a shell, which can close streams."""
    line = f'"$0" -c "$1" "$2" $3 {redirect}'
    command = ["bash", "-o", "pipefail", "-c", line, sys.executable, PROGRAM, *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
        timeout=100,
        check=False,
        cwd=cwd,
    )


@pytest.mark.parametrize(
    ("redirect", "reason"),
    [
        ("| true", "Broken pipe"),
        (">&-", "it is closed"),
        pytest.param(
            "> /dev/full",
            "No space left on device",
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full"),
        ),
    ],
)
def test_a_stdout_that_takes_nothing(redirect: str, reason: str, tmp_path: Path) -> None:
    done = in_shell(redirect, tmp_path, "named", "log.txt")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    notice = f"stdout: {reason}; the command continues, and its lines go to its log"
    if "|" not in redirect:  # The reader of a pipe may leave after the first line.
        assert lines.count(notice) == 1
    assert set(lines) <= {notice, "ours on stderr", "details: log.txt"}
    written = lines_of(tmp_path / "log.txt")
    assert written[-1] == "no line endthe end"
    assert [line for line in written[:-1] if line != "ours on stdout"] == LINES[:-1]


def test_no_stream_at_all(tmp_path: Path) -> None:
    done = in_shell("<&- >&- 2>&-", tmp_path, "named", "log.txt")
    assert done.returncode == 0
    written = lines_of(tmp_path / "log.txt")
    assert {"ours on stdout", "ours on stderr", "no line endthe end"} <= set(written)


def test_a_pipe_that_does_not_wait_is_waited_for(tmp_path: Path) -> None:
    """Another program may have made a shared pipe non-blocking, as some servers of builds do."""
    program = (
        "import os; os.set_blocking(1, False)\n"
        "from resnet_dist.system import streams; from resnet_dist.cli.options import out\n"
        "streams.take_streams()\nfor _ in range(300): out.print('x' * 1000)"
    )
    done = subprocess.run(
        f'"{sys.executable}" -c "$PROGRAM" | (sleep 1; wc -c)',
        shell=True,
        env=ENVIRONMENT | {"PROGRAM": program},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("300300", "")


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_terminal_that_shows_ascii_alone(environment: dict[str, str], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from resnet_dist.system import streams; from resnet_dist.cli.options import err, out\n"
        "streams.take_streams()\nfor console in (out, err): console.print('größe … 8 × 8 \\udcff 日')"
    )
    done = subprocess.run(
        [sys.executable, program],
        env=ENVIRONMENT | environment,
        capture_output=True,
        check=False,
        timeout=100,
    )
    line = b"gr\\xf6\\xdfe ... 8 x 8 \\xff \\u65e5\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, line, line)


def test_a_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "MAX_LOG_BYTES", 1000)
    monkeypatch.setattr(log_writer, "MAX_EARLY_BYTES", 500)
    log = log_writer.LogFile()
    for number in range(100):
        log.add(f"early {number}")
    log.move_to(tmp_path / "log.txt")
    first = (tmp_path / "log.txt").read_text()
    assert re.match(r"\(before this line 8\d are lost\)\n", first)
    assert "early 99" in first
    for number in range(200):
        log.add(f"late {number}")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"log.txt", "log-old.txt"}
    assert max(sizes.values()) < 1100
    assert "late 199" in (tmp_path / "log.txt").read_text()


def test_a_process_that_a_command_leaves_holds_nothing_up(tmp_path: Path) -> None:
    """A child that lives on has the log's pipe open; the command and whoever waits for its output end all the same."""
    program = PROGRAM.replace("echo library 4 >&2", "echo library 4 >&2; sleep 300 & echo $! > pid")
    command = [sys.executable, "-c", program, "named", "log.txt"]
    options = {"capture_output": True, "text": True, "env": ENVIRONMENT, "cwd": tmp_path}
    done = subprocess.run(command, timeout=100, check=False, **options)  # type: ignore[call-overload]
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # It is still there.
    assert done.stderr.endswith("details: log.txt\n")


def test_a_fork_does_not_keep_the_log_open(tmp_path: Path) -> None:
    program = PROGRAM.replace(
        "ends[sys", "os.fork() or (os.close(0), __import__('time').sleep(0.5), os._exit(0))\nends[sys"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, "kill", "log.txt"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, timeout=100, check=False, cwd=tmp_path
    )
    assert done.stderr.endswith("details: log.txt\n")


SIGNALLED = """
import os, signal, time
from pathlib import Path
from resnet_dist.system import streams
streams.take_streams()
streams.divert()
log = Path("log.txt")
streams.log_to(log)
print("before")
while not log.exists():  # The writer has begun.
    time.sleep(0.01)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    os.kill(streams._streams.writer.pid, number)
print("after")
streams.set_end("silent")
"""


def test_a_signal_to_all_processes_of_a_command_leaves_its_log(tmp_path: Path) -> None:
    """Ray Jobs stops a job by a signal to every descendant of its command."""
    command = [sys.executable, "-c", SIGNALLED]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        "before",
        "after",
    ]
