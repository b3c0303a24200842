"""Options of all commands: values that a shell makes by accident, such as `~` after `=`, and an empty one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from resnet_dist import __version__
from resnet_dist.cli import app
from resnet_dist.cli.main import run_command
from resnet_dist.cli.options import typed_place
from resnet_dist.errors import UserError
from tests.paths import JOBS

DIGITS, STUDY = str(JOBS / "digits.py"), str(JOBS / "plain_vs_residual.py")


def commands(group: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command with its name."""
    group = group or typer.main.get_command(app)
    for part, command in group.commands.items():
        whole = f"{name} {part}".strip()
        if hasattr(command, "commands"):
            yield from commands(command, whole)
        else:
            yield whole, command


@pytest.mark.parametrize(
    ("typed", "place"),
    [
        ("output", "output"),
        ("~/runs", "/home/anna/runs"),
        ("~no-such-user/runs", "~no-such-user/runs"),
        ("file:///mnt/a%20b", "/mnt/a b"),
        ("s3://bucket/runs", "s3://bucket/runs"),
        ("2026-11-27T20:43:00", "2026-11-27T20:43:00"),
    ],
)
def test_a_place_for_runs(typed: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    assert typed_place(typed) == place


def test_every_output_is_read_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    outputs = [
        option.process_value(typer.Context(command), "~/runs")
        for _, command in commands()
        for option in command.params
        if option.opts == ["--output"]
    ]
    assert len(outputs) > 10
    # Those of commands that write to no bucket are a Path, which `local_folder` reads.
    assert {place for place in outputs if isinstance(place, str)} == {"/home/anna/runs"}


def test_a_url_with_one_slash_is_no_folder() -> None:
    with pytest.raises(UserError, match="--output 's3:/bucket/runs': a URL has two slashes"):
        typed_place("s3:/bucket/runs")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", DIGITS, "--local", "--output", ""], "the word after --output"),
        (["train", "--local", ""], "the word after --local"),
        (["train", DIGITS, "--address="], "--address"),
        (["train", "", "--local"], "an argument"),
        (["prepare", "digits", ""], "an argument"),
        (["prepare", "--output=s3://anna:hush@host", ""], "an argument"),
        (["runs", "show", "a", "--output", ""], "the word after --output"),
    ],
)
def test_an_empty_word_is_refused(
    words: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["resnet-dist", *words])
    assert run_command() == 2
    assert capsys.readouterr().err.startswith(f"error: {named} is empty, as a variable of the shell that is ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "problem"),
    [("a file", "is a file; give another folder"), ("x" * 300, "a name in it has 300 bytes, at most ")],
)
@pytest.mark.parametrize("command", ["train", "study"])
def test_an_output_that_cannot_be_written_is_named_as_it_was_typed(
    command: str,
    output: str,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And not as MLflow's file in it, which nobody typed."""
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    job = {"train": [DIGITS, "--local"], "study": [STUDY]}[command]
    monkeypatch.setattr(sys, "argv", ["resnet-dist", command, *job, "--output", output])
    assert run_command() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --output ")
    assert problem in line


def test_a_name_that_no_file_can_have_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sys, "argv", ["resnet-dist", "runs", "--output", "x" * 300])
    assert run_command() == 2
    assert capsys.readouterr().err.endswith("x'…: File name too long\n")


@pytest.mark.parametrize(
    ("words", "printed"),
    [(["--version"], f"resnet-dist {__version__}"), (["-h"], "Usage: "), (["runs", "-h"], "Usage: ")],
)
def test_what_a_stranger_asks_first(
    words: list[str],
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if words[-1] == "-h":  # It is as fast as --help, which prepares no environment.
        monkeypatch.setattr(sys.modules[run_command.__module__], "_prepare", None)
    monkeypatch.setattr(sys, "argv", ["resnet-dist", *words])
    assert run_command() == 0
    assert printed in capsys.readouterr().out
