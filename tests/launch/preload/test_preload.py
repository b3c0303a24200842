"""Ranks that are copies of one process: it lives on when they die, they end with their client, and it ends by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.launch.preload import client
from resnet_dist.launch.preload.client import Died, Unavailable, run_rank
from resnet_dist.launch.preload.copies import standing
from tests.paths import ROOT

TARGET = "tests.launch.preload.functions:act"
LIMIT_SECONDS = 40.0  # less than the server waits for another rank


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the key of a server of the test's own, which has ended after the test."""
    name = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="pre") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield name
        path = client._socket_path(name)
        if path.exists():
            parent = run_rank(TARGET, {"finished": True}, name)["parent"]
            wait_until(lambda: not is_alive(parent))


def test_the_process_that_imports_outlives_its_ranks(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = run_rank(TARGET, {}, key)
    monkeypatch.setenv("PRELOAD_TEST", "later")
    monkeypatch.chdir(tmp_path)
    for end, text in (("die", "by SIGKILL"), ("crash", "by SIGSEGV"), ("leave", "with exit code 7")):
        with pytest.raises(Died, match=f"the process of the rank .*ended {text}"):
            run_rank(TARGET, {"end": end}, key)
    with pytest.raises(ValueError, match="^a shape") as raised:
        run_rank(TARGET, {"end": "raise"}, key)
    assert str(raised.value) == "a shape"
    assert "functions.py" in raised.value.__notes__[0]
    with pytest.raises(RuntimeError, match="^Odd: an odd error"):
        run_rank(TARGET, {"end": "raise oddly"}, key)
    last = run_rank(TARGET, {"say": "hello", "finished": True}, key)
    assert (first["variable"], last["variable"]) == (None, "later")
    assert last["folder"] == str(tmp_path)
    assert first["parent"] == last["parent"]
    assert len({first["pid"], last["pid"], os.getpid()}) == 3
    shown = capfd.readouterr()
    assert "hello" in shown.out
    # The crash has shown its line, on the stream of the client.
    assert "Segmentation fault" in shown.err
    assert "functions.py" in shown.err
    # The run has finished: its process is needed no more, and leaves nothing behind.
    wait_until(lambda: not is_alive(first["parent"]))
    assert not client._socket_path(key).exists()


def client_process(key: str, orders: dict[str, Any], *before: str) -> subprocess.Popen[str]:
    """Start a client in a process of its own, by the command `before`, which prints the server's process."""
    program = (
        "import json, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from resnet_dist.launch.preload.client import run_rank\n"
        "print(run_rank(sys.argv[2], json.loads(sys.argv[4]), sys.argv[3])['parent'])"
    )
    command = [*before, sys.executable, "-c", program, tempfile.gettempdir(), TARGET, key, json.dumps(orders)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_the_process_that_imports_ends_with_the_parent_of_its_first_client(key: str) -> None:
    """It is Ray's on that node: a run that was interrupted leaves nothing behind on a machine without Ray."""
    parent = "import subprocess, sys; subprocess.run(sys.argv[1:], check=True)"
    # The rank has not finished its run: the server would wait for the next attempt.
    process = client_process(key, {}, sys.executable, "-c", parent)
    server = int(process.communicate(timeout=LIMIT_SECONDS)[0].split()[-1])
    wait_until(lambda: not is_alive(server))
    assert not client._socket_path(key).exists()


@pytest.mark.parametrize("victim", ["client", "server"])
def test_a_rank_ends_with_its_client_and_with_the_server(key: str, tmp_path: Path, victim: str) -> None:
    sign = tmp_path / "sign"
    process = client_process(key, {"end": "hang", "sign": str(sign)})
    try:
        wait_until(lambda: sign.exists() and sign.read_text() != "")
        rank = int(sign.read_text())
        (server,) = {int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])}
        os.kill(process.pid if victim == "client" else server, signal.SIGKILL)
        wait_until(lambda: not is_alive(rank))
        assert process.wait(LIMIT_SECONDS) != 0
        # By the same process, or by a new one, which ends with the run: it holds the output that is read below.
        answer = run_rank(TARGET, {"finished": True}, key)
        assert (answer["parent"] == server) == (victim == "client")
    finally:
        process.kill()
        process.communicate()


def test_a_rank_that_cannot_be_copied_is_reported_before_it_begins(key: str) -> None:
    orders: dict[str, Any] = {}
    with pytest.raises(Unavailable):  # The import fails; the rank's own process then shows why.
        run_rank("tests.launch.preload.missing:act", orders, key)
    wait_until(lambda: not client._socket_path(key).exists())
    folder = client._socket_path(key).parent
    folder.chmod(0o755)  # Others could connect.
    with pytest.raises(Unavailable):
        run_rank(TARGET, orders, key)
    folder.chmod(0o700)


def test_what_is_imported_ahead_serves_ranks_and_ends_with_its_process(key: str, tmp_path: Path) -> None:
    program = (
        "import sys, tempfile, time; tempfile.tempdir = sys.argv[1]\n"
        "from resnet_dist.launch.preload import client\n"
        "client.import_ahead(sys.argv[2]); client.import_ahead(sys.argv[2])\n"
        "print(client.key_ahead(), client._ahead[0][1].pid, len(client._ahead), flush=True); sys.stdin.read()"
    )
    # The second one never ends its import.
    (tmp_path / "hanging.py").write_text("import time; time.sleep(600)")
    for target in (TARGET, "hanging:act"):
        command = [sys.executable, "-c", program, tempfile.gettempdir(), target]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as driver:
            assert driver.stdout is not None
            *words, server, count = driver.stdout.readline().split()
            assert count == "1"
            path = client._socket_path(" ".join(words))
            if target == TARGET:
                assert run_rank(TARGET, {}, " ".join(words))["parent"] == int(server)
            driver.kill()
        wait_until(lambda server=server: not is_alive(int(server)))  # type: ignore[misc]
        wait_until(lambda path=path: not path.exists())  # type: ignore[misc]


def test_nothing_is_imported_ahead_where_ranks_import_for_themselves(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(client.OFF_VARIABLE, "0")
    client.import_ahead(TARGET)
    assert client.key_ahead() == ""


def test_a_rank_stands_as_its_client(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray lets its processes wait for others, and lets the system end them first where memory ends."""
    before = run_rank(TARGET, {}, key)["standing"]
    assert before == standing()
    behind = {"nice": min(19, before["nice"] + 3), "oom_score_adj": 900}
    monkeypatch.setattr(client, "standing", lambda: behind)
    assert run_rank(TARGET, {"finished": True}, key)["standing"] == behind
