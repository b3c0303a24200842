""".ci/run: its parts run side by side, are printed one after the other, and each that fails fails the whole."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.jobs.real_head import wait_until
from tests.paths import ROOT

# In place of uv: reports what it is asked for, whether Ctrl-C reaches it, and its end; fails where $FAILS is asked for.
UV = """#!/bin/sh
case "$*" in *pytest*) ;; *) exit 0 ;; esac
echo "begin $*"
grep SigIgn: /proc/self/status
sleep 0.2
echo "end $*"
case "$*" in *"$FAILS"*) exit 3 ;; esac
"""
# Works until Ctrl-C, for a minute at most.
LONG_UV = """#!/bin/sh
case "$*" in *pytest*) ;; *) exit 0 ;; esac
trap 'echo "end $*" >> "$LOG"; exit 2' INT
echo "begin $*" >> "$LOG"
for _ in $(seq 600); do sleep 0.1; done
"""
NOTHING = "#!/bin/sh\nexit 0\n"
NO_ROOT = "#!/bin/sh\necho 1000\n"


def start(folder: Path, uv: str, **variables: str) -> subprocess.Popen[str]:
    """Start a copy of .ci/run with programs that do nothing. uv: the text of the one in place of uv."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", folder / ".ci/run")
    programs = folder / "programs"
    programs.mkdir()
    for name, text in (("uv", uv), ("python3", NOTHING), ("pip", NOTHING), ("id", NO_ROOT)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [folder / ".ci/run"],
        env={**os.environ, "PATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores it, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(folder: Path, fails: str) -> tuple[int, list[str]]:
    """Run .ci/run to its end; return its exit code and lines."""
    with start(folder, UV, FAILS=fails) as process:
        out, err = process.communicate(timeout=60)
    assert err == ""
    return process.returncode, out.splitlines()


def test_parts_are_printed_whole_and_then_comes_the_command_of_the_readme(tmp_path: Path) -> None:
    code, lines = run(tmp_path, "nothing")
    assert code == 0
    began = [line.removeprefix("begin ") for line in lines if line.startswith("begin ")]
    ended = [line.removeprefix("end ") for line in lines if line.startswith("end ")]
    assert began == ended  # One after the other.
    assert len(began) == 3
    assert began[-1] == "run pytest"
    interrupt = 1 << signal.SIGINT - 1
    ignored = [int(line.split()[1], 16) for line in lines if line.startswith("SigIgn:")]
    assert len(ignored) == 3
    assert not any(mask & interrupt for mask in ignored)  # Tests that press Ctrl-C inherit this.


def test_every_long_test_is_in_one_part(tmp_path: Path) -> None:
    _, lines = run(tmp_path, "nothing")
    clusters, others = [line for line in lines if line.startswith("begin ")][:2]
    (left_out,) = re.findall(r" tests/cluster -k not (\w+)", clusters)
    # Pytest's -k looks at the names of files too.
    files = [path.stem for path in (ROOT / "tests/cluster").glob("test_*.py") if left_out in path.stem]
    assert files == ["test_ray_faults"]
    assert others.endswith("--ignore tests/cluster")
    assert all("--all -m long" in part for part in (clusters, others))


@pytest.mark.parametrize("fails", ["-k not test_ray_faults", "--ignore tests/cluster"])
def test_a_part_that_fails_is_named_and_the_others_are_shown(tmp_path: Path, fails: str) -> None:
    code, lines = run(tmp_path, fails)
    assert code == 1
    assert len([line for line in lines if line.startswith("end ")]) == 2  # README's command is not run.
    (failed,) = [line for line in lines if line.startswith("failed: ")]
    assert lines[-1] == failed
    assert f"=== {failed.removeprefix('failed: ')}: exit code 3" in lines


def test_an_interruption_reaches_all_parts_and_leaves_nothing(tmp_path: Path) -> None:
    log, kept = tmp_path / "log", tmp_path / "kept"
    kept.mkdir()
    with start(tmp_path, LONG_UV, LOG=str(log), TMPDIR=str(kept)) as process:
        wait_until(lambda: log.exists() and log.read_text().count("begin ") == 2, 60.0)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stdout is not None
        shown = process.stdout.read()
    assert shown.count("interrupted, or ended before this was") == 2
    lines = sorted(log.read_text().splitlines())
    assert [line.partition(" ")[2] for line in lines[:2]] == [line.partition(" ")[2] for line in lines[2:]]
    assert list(kept.iterdir()) == []
