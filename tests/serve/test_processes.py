"""The processes of a server: one that cannot load the model ends all, and nothing stays behind a server that was killed."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from uvicorn import Config

from resnet_dist.errors import ExplainedError, StorageError
from resnet_dist.serve import run
from resnet_dist.serve.app import Settings

SETTINGS = Settings(Path("missing"), "pets", 1.0, 5, 1, gpu=False)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (StorageError("the file is gone"), "the file is gone"),
        (RuntimeError("two\nlines"), r"RuntimeError: two\nlines"),
    ],
)
def test_a_process_that_cannot_load_the_model_ends_all(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception, sentence: str
) -> None:
    def fails(settings: Settings) -> None:
        raise error

    monkeypatch.setattr(run, "make_app", fails)
    with pytest.raises(SystemExit) as end:
        run.worker_app(SETTINGS)
    assert end.value.code == 3  # uvicorn starts a process with any other code again, forever.
    assert capfd.readouterr().err == f"error: the model cannot be loaded: {sentence}\n"


@pytest.mark.parametrize("exit_code", [0, 3])
def test_a_server_that_could_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch, exit_code: int) -> None:
    def ended(supervisor: Any) -> None:
        supervisor.processes = [SimpleNamespace(exitcode=exit_code)]

    monkeypatch.setattr(run.Supervisor, "run", ended)
    with socket.socket() as port:
        if exit_code == 0:
            run._serve_in_processes(SETTINGS, port, 2)
        else:
            with pytest.raises(ExplainedError, match="could not load the model"):
                run._serve_in_processes(SETTINGS, port, 2)


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_hangup_ends_a_server_that_does_not_ignore_it(is_ignored: bool) -> None:
    with run._own_signals():
        signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
        supervisor = run.Supervisor(Config("x", workers=2), [])
        supervisor.signal_queue.append(signal.SIGHUP)
        supervisor.handle_signals()
    assert supervisor.should_exit.is_set() is not is_ignored


def test_the_folders_of_servers_that_were_killed_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, fresh = (tmp_path / f"{run.FOLDER_PREFIX}{name}" for name in ("killed", "fresh"))
    for folder in (killed, fresh):
        (folder / "model").mkdir(parents=True)
    with run.own_folder() as alive:
        for folder in (killed, alive):
            os.utime(folder, (0, 0))
        with run.own_folder() as other:
            assert sorted(tmp_path.iterdir()) == sorted([fresh, alive, other])
    assert list(tmp_path.iterdir()) == [fresh]


@pytest.mark.long
def test_processes_end_with_their_parent(checkpoint: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "resnet_dist", "serve", str(checkpoint), "--workers", "2", "--cpu"]
    with subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while "Ctrl-C ends it" not in process.stdout.readline():
            assert process.poll() is None
        left = psutil.Process(process.pid).children(recursive=True)
        assert len(left) >= 2
        process.kill()
        _, alive = psutil.wait_procs(left, 60)
        assert not alive
