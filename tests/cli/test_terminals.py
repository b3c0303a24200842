"""Terminals and logs of all kinds: a person sees the progress, and a command outlives whoever reads it."""

from __future__ import annotations

import errno
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from resnet_dist.cli.models import evaluate
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.system.signals import handle_signals
from resnet_dist.tracking.spool import Follower
from resnet_dist.tracking.store import STORE_FILE
from tests.paths import JOBS, ROOT

PROGRAM = """
from resnet_dist.system import streams
from resnet_dist.cli.options import err, out
from resnet_dist.terminal import bars, make_reporter
from resnet_dist.tracking.spool import Entry
streams.take_streams()
with make_reporter(out) as reporter:
    reporter.begin(4)
    reporter.note("a note")
    err.print("a warning")
    reporter.entry(Entry(1, 2, {"train/loss": 1.5}))
    reporter.entry(Entry(1, 4, {"eval/loss": 0.5}))
with bars(out, ["train"], "images") as show:
    show("train", 5, 9)
out.print("the end")
"""
VARIABLES = (
    "TERM",
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "FORCE_COLOR",
    "TTY_COMPATIBLE",
    "PYTHONIOENCODING",
    "LC_ALL",
)
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {
    "PYTHONPATH": str(ROOT)
}
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command on a terminal of its own; leaving the context ends the command."""

    def __init__(self, command: list[str], environment: dict[str, str], cwd: Path = ROOT) -> None:
        pid, self._descriptor = pty.fork()
        if pid == 0:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # The tests may run under nohup, which ignores it.
            os.chdir(cwd)
            os.execve(command[0], command, environment)
        self.pid, self.text, self.code = pid, "", None

    def read_on(self) -> bool:
        """Read what comes next; return False at the end."""
        try:
            data = os.read(self._descriptor, 65536)
        except OSError as error:
            assert error.errno == errno.EIO  # Linux reports the end so.
            return False
        self.text += data.decode(errors="replace")
        return bool(data)

    def wait_for(self, words: str) -> None:
        while words not in self.text:
            assert self.read_on(), self.text

    def hang_up(self) -> None:
        """Take the terminal away, as a lost connection does: the kernel sends SIGHUP."""
        os.close(self._descriptor)
        self._descriptor = -1

    def wait(self) -> int:
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


@pytest.mark.parametrize(
    ("variables", "is_bar"),
    [
        pytest.param({"TERM": "xterm"}, True, marks=pytest.mark.long),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True),
        pytest.param({"TERM": "xterm", "COLUMNS": "20"}, True, marks=pytest.mark.long),
        ({"TERM": "xterm", "COLUMNS": "0"}, True),
        pytest.param({"TERM": "xterm", "COLUMNS": "wide"}, True, marks=pytest.mark.long),
        pytest.param({"TERM": "xterm", "PYTHONIOENCODING": "ascii"}, True, marks=pytest.mark.long),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_a_person_at_a_terminal_sees_progress(variables: dict[str, str], is_bar: bool) -> None:
    with Terminal([sys.executable, "-c", PROGRAM], ENVIRONMENT | variables) as terminal:
        while terminal.read_on():
            pass
        assert terminal.wait() == 0, terminal.text
    text = ESCAPE.sub("", terminal.text)
    for words in ("a note", "a warning", "step 4/4  eval loss 0.5000", "the end"):
        assert words in text
    assert ("step 2/4  loss 1.5000" in text) != is_bar
    assert ("2/4" in text) or variables.get("COLUMNS") == "20"
    assert ("train: 5 of 9 images" in text) != is_bar
    if not is_bar:
        assert "\x1b" not in terminal.text
    if "NO_COLOR" in variables:
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", terminal.text)
    if "PYTHONIOENCODING" in variables:
        assert terminal.text.isascii()


@pytest.mark.parametrize("variables", [{"FORCE_COLOR": "1", "TERM": "xterm", "TTY_COMPATIBLE": "1"}, {}])
def test_a_log_gets_plain_lines(variables: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=ENVIRONMENT | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "a warning\n")
    lines = [
        "a note",
        "step 2/4  loss 1.5000",
        "step 4/4  eval loss 0.5000",
        "train: 5 of 9 images",
        "the end",
    ]
    assert done.stdout.splitlines() == lines


def test_a_reader_that_waits_holds_up_no_thread() -> None:
    """A pager waits, and so does a terminal after Ctrl-S: what follows the spool sends its metrics all the same."""
    program = (
        "import os\nfrom resnet_dist.system import streams\nfrom resnet_dist.cli.options import out\n"
        "from resnet_dist.terminal import make_reporter\nstreams.take_streams()\n"
        "with make_reporter(out) as reporter:\n"
        "    for _ in range(3000):\n        reporter.note('x' * 99)\n"
        "    os.write(2, b'sent')\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], env=ENVIRONMENT, **pipes) as process:  # type: ignore[call-overload]
        assert process.stderr is not None
        assert process.stderr.read(4) == b"sent"  # Nobody has read a line.
        out, _ = process.communicate(timeout=100)
    assert len(out) == 300_000


def test_help_on_a_terminal_of_no_width() -> None:
    command = [sys.executable, "-m", "resnet_dist", "--help"]
    environment = ENVIRONMENT | {"COLUMNS": "0", "LINES": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=100)
    assert "evaluate" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
@pytest.mark.parametrize(("redirect", "code"), [("> /dev/full", 1), (">&-", 1), ("| true", 0)])
def test_a_result_that_cannot_be_printed_is_an_error(redirect: str, code: int) -> None:
    """Training goes on without a reader; a command whose result is what it prints has failed."""
    program = (
        "import sys\nfrom resnet_dist.cli import app, main\nfrom resnet_dist.cli.summary import print_json\n"
        "@app.command()\ndef result() -> None:\n    print_json({'a': 1})\n"
        "sys.argv[1:] = ['result']\nmain()"
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" {redirect}', sys.executable, program],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == code, done.stderr
    assert ("error: the result could not be written to stdout (" in done.stderr) == bool(code)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_signals_that_would_end_a_run_without_a_checkpoint(number: signal.Signals) -> None:
    """They interrupt; those that the process was started to ignore, as by nohup, it ignores."""
    counts: list[int] = []
    before = signal.signal(number, signal.SIG_DFL)  # The tests may run under nohup, which ignores SIGHUP.
    try:
        with handle_signals(counts.append):
            os.kill(os.getpid(), number)
            with handle_signals(counts.append):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_DFL
        assert counts == [1, 1]
        signal.signal(number, signal.SIG_IGN)
        with handle_signals(counts.append):
            os.kill(os.getpid(), number)
        assert counts == [1, 1]
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_child_keeps_the_signals_blocked_that_its_parent_handles() -> None:
    program = (
        "import os, signal, subprocess, sys\nfrom resnet_dist.system.signals import kept_from_children\n"
        "child = 'import os, signal; os.kill(os.getpid(), signal.SIGHUP); print(1)'\n"
        "with kept_from_children(signal.SIGHUP):\n    subprocess.run([sys.executable, '-c', child], check=True)\n"
        "assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()"
    )
    subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, check=True, timeout=100)


SHORT = [
    "model.name=resnet8",
    "schedule.warmup=2 steps",
    "train.checkpoint_every=1000 steps",
    "train.eval_every=100000 steps",
    "train.log_every=2 steps",
]


def train_command(output: Path, data: Path, *words: str, length: str = "100000 steps") -> list[str]:
    settings = [*SHORT, f"train.length={length}", f"data.train={data}/train", f"data.eval={data}/eval"]
    sets = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "resnet_dist", "train", str(JOBS / "digits.py"), "--name", "a", *sets]
    return [*command, "--output", str(output), *words]


def status_of(output: Path) -> str:
    (found,) = mlflow.MlflowClient(f"sqlite:///{output}/mlflow.db").search_runs(["1"])
    return str(found.info.status)


@pytest.mark.long
@pytest.mark.parametrize("where", [["--local"], ["--workers", "2"]])
def test_a_connection_that_goes_away_leaves_a_checkpoint(
    where: list[str], digits_data: Path, tmp_path: Path
) -> None:
    environment = {
        name: value for name, value in ENVIRONMENT.items() if not name.startswith(("RAY_", "MLFLOW_"))
    }
    command = train_command(tmp_path, digits_data, *where)
    with Terminal(command, environment | {"TERM": "dumb"}) as terminal:
        terminal.wait_for("step 6/")
        terminal.hang_up()
        assert terminal.wait() == 130
    assert status_of(tmp_path) == "KILLED"
    assert len(list((tmp_path / "runs/a/checkpoints").glob("step-*"))) == 1
    log = (tmp_path / "runs/a/log.txt").read_text()
    assert "this continues it:" in log


@pytest.mark.long
def test_a_run_under_nohup_outlives_its_terminal(digits_data: Path, tmp_path: Path) -> None:
    command = train_command(tmp_path, digits_data, "--local", length="40 steps")
    program = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    with Terminal([sys.executable, "-c", program, *command], ENVIRONMENT | {"TERM": "dumb"}) as terminal:
        terminal.wait_for("step 6/")
        terminal.hang_up()
        assert terminal.wait() == 0
    assert status_of(tmp_path) == "FINISHED"


@pytest.mark.long
def test_a_run_that_is_suspended_continues(digits_data: Path, tmp_path: Path) -> None:
    command = train_command(
        tmp_path, digits_data, "--local", "--set", "train.stall_timeout_seconds=2", length="40 steps"
    )
    with Terminal(command, ENVIRONMENT | {"TERM": "dumb"}) as terminal:
        terminal.wait_for("step 6/")
        os.kill(terminal.pid, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(terminal.pid, os.WUNTRACED)[1])
        with suppress(subprocess.TimeoutExpired):  # longer than the limit of the watchdog
            subprocess.run(["sleep", "8"], check=True)
        os.kill(terminal.pid, signal.SIGCONT)
        while terminal.read_on():
            pass
        assert terminal.wait() == 0, terminal.text
    assert status_of(tmp_path) == "FINISHED"


@pytest.fixture(scope="module")
def local_run(
    digits_data: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Train on a machine as bare as can be: no stdin, ASCII, colors forced, a stdout whose reader leaves at once."""
    output = tmp_path_factory.mktemp("output")
    shutil.copy(empty_store, output / STORE_FILE)
    command = train_command(output, digits_data, "--local", length="8 steps")
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii", "FORCE_COLOR": "1", "COLUMNS": "0"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", '"$@" <&- | head -1', "bash", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run a: 8 steps, 1 rank(s)\n"
    return output, done.stderr


def test_a_reader_that_leaves_costs_no_metric(local_run: tuple[Path, str]) -> None:
    output, stderr = local_run
    assert stderr.splitlines() == [
        "stdout: Broken pipe; the command continues, and its lines go to its log",
        f"details: {output}/runs/a/log.txt",
    ]
    assert status_of(output) == "FINISHED"
    client = mlflow.MlflowClient(f"sqlite:///{output}/mlflow.db")
    (found,) = client.search_runs(["1"])
    sent = {
        (name, metric.step)
        for name in found.data.metrics
        for metric in client.get_metric_history(found.info.run_id, name)
    }
    entries = Follower(open_storage(output / "runs/a").log("spool.jsonl")).read()
    assert sent == {(name, entry.step) for entry in entries for name in entry.metrics}
    assert max(step for _, step in sent) == 8
    log = (output / "runs/a/log.txt").read_text()
    assert "step 8/8  eval loss" in log
    assert "browse     resnet-dist ui" in log


@pytest.mark.long
def test_an_evaluation_prints_its_metrics_alone(local_run: tuple[Path, str], digits_data: Path) -> None:
    output, _ = local_run
    command = [
        sys.executable,
        "-m",
        "resnet_dist",
        "evaluate",
        str(output / "runs/a"),
        str(digits_data / "eval"),
        "--cpu",
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=200)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert "eval/samples  360" in lines
    assert [line for line in lines if not re.fullmatch(r"eval/\w+ +[0-9.]+(e-\d+)?", line)] == []


OURS = re.compile(
    r"(preparing|starting Ray|run a: |no rank has begun|step \d+/\d+  |top-1 |speed |checkpoint |browse |details: )"
)


@pytest.mark.long
@pytest.mark.parametrize("where", [["--local"], ["--workers", "2"]])
def test_every_line_of_a_run_is_ours(where: list[str], digits_data: Path, tmp_path: Path) -> None:
    environment = {
        name: value for name, value in ENVIRONMENT.items() if not name.startswith(("RAY_", "MLFLOW_"))
    }
    command = train_command(tmp_path, digits_data, *where, length="6 steps")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    assert len(lines) > 6
    assert [line for line in lines if not OURS.match(line)] == []


@pytest.mark.long
def test_a_loss_that_is_not_finite_under_ray(digits_data: Path, tmp_path: Path) -> None:
    environment = {
        name: value for name, value in ENVIRONMENT.items() if not name.startswith(("RAY_", "MLFLOW_"))
    }
    words = [
        "optim.lr=1e6",
        "schedule.warmup=0 steps",
        "train.checkpoint_every=2 steps",
        "model.name=resnet20",
    ]
    sets = [word for setting in words for word in ("--set", setting)]
    command = train_command(tmp_path, digits_data, *sets, length="100 steps")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "optim.lr" in sentence
    assert "Traceback" not in done.stderr
    assert status_of(tmp_path) == "FAILED"


def test_the_bar_of_an_evaluation_ends_with_all_images_or_where_it_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[int] = []
    monkeypatch.setattr(evaluate, "can_move", lambda console: True)
    bar = nullcontext(lambda name, done, total: shown.append(done))
    monkeypatch.setattr(evaluate, "bars", lambda *_: bar)
    index: Any = SimpleNamespace(num_samples=10)
    job: Any = SimpleNamespace(
        trained=SimpleNamespace(recipe=SimpleNamespace(data=SimpleNamespace(global_batch_size=4)))
    )
    for error, last in ((None, 10), (OSError("x"), 4)):
        with suppress(OSError), evaluate._progress(index, job) as show:
            show(1)
            if error is not None:
                raise error
        assert shown[-1] == last
