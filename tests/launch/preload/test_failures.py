"""Failures around a rank's copy: the server and its other ranks live on, and the client is given the reason."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import selectors
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from resnet_dist.launch.preload import client, server
from resnet_dist.launch.preload.client import Unavailable, run_rank
from resnet_dist.launch.preload.copies import Child
from resnet_dist.launch.preload.server import Server
from resnet_dist.launch.preload.wire import NOTES, pack_answer, receive, refusal_in, send, send_streams
from tests.launch.preload.test_preload import is_alive, wait_until

OPEN = Path("/proc/self/fd")


@pytest.fixture
def socket_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pre") as short:
        yield Path(short) / "socket"


@pytest.fixture
def serving(socket_path: Path) -> Iterator[Server]:
    """Yield a server in this process, without its signal handlers."""
    made = object.__new__(Server)
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(str(socket_path))
        listener.listen()
        made._listener, made._selector, made._children, made._finished = listener, selector, {}, False
        made._unended = {}
        yield made


@pytest.mark.parametrize(
    ("request_sent", "reason"),
    [(b"{}", "no processes"), (b"{", "Expecting"), (None, "not complete")],
    ids=["fork", "broken", "none"],
)
def test_a_client_that_gets_no_rank_is_refused_with_the_reason(
    serving: Server,
    socket_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request_sent: bytes | None,
    reason: str,
) -> None:
    def no_fork() -> int:
        raise BlockingIOError("no processes are left")

    monkeypatch.setattr(os, "fork", no_fork)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(socket_path))
        before = len(list(OPEN.iterdir()))
        send_streams(connection)
        if request_sent is None:
            connection.shutdown(socket.SHUT_WR)
        else:
            send(connection, request_sent)
        serving._accept()
        assert reason in (refusal_in(receive(connection) or b"") or "")
        assert len(list(OPEN.iterdir())) == before  # Nothing leaks.
    assert not serving._children


def test_a_connection_that_cannot_be_taken_leaves_the_server_alive(serving: Server) -> None:
    serving._listener.setblocking(False)  # accept() fails, as without a free descriptor.
    serving._accept()
    assert not serving._children


def next_orders(serving: Server, socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the orders that the copy for the next client gets."""
    given: list[dict[str, Any]] = []

    def become(connection: socket.socket, streams: list[int], request: dict[str, Any]) -> NoReturn:
        given.append(request["orders"])
        connection.close()
        raise SystemExit

    with socket.socket(socket.AF_UNIX) as connection, monkeypatch.context() as changed:
        changed.setattr(os, "fork", lambda: 0)
        changed.setattr(serving, "_become_rank", become)
        connection.connect(str(socket_path))
        send_streams(connection)
        send(connection, json.dumps({"orders": {NOTES: {"own": "a note"}}}).encode())
        with pytest.raises(SystemExit):
            serving._accept()
    return given[0]


def test_a_killed_rank_that_does_not_end_is_not_waited_for(
    serving: Server,
    socket_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "kill", lambda *_: None)  # as in an uninterruptible sleep
    monkeypatch.setattr(server, "DEATH_SECONDS", 0.1)
    stuck = subprocess.Popen(["sleep", "600"])
    ours, theirs = socket.socketpair()
    try:
        serving._children[stuck.pid] = Child(stuck.pid, ours)
        serving._selector.register(ours, selectors.EVENT_READ)
        serving._end_ranks_of([ours])
        assert not serving._children
        line = f"process {stuck.pid} of an earlier rank on {platform.node()} has not ended within 0.1 s of its SIGKILL"
        assert line in capsys.readouterr().err
        assert receive(theirs) is None
        # Nobody may read that output: the next rank reports it, as long as it is so.
        notes = next_orders(serving, socket_path, monkeypatch)[NOTES]
        assert notes.pop("own") == "a note"
        assert [key for key, sentence in notes.items() if sentence.startswith(line)] == [
            f"unended-{platform.node()}-{stuck.pid}"
        ]
        monkeypatch.undo()
        stuck.kill()
        wait_until(lambda: not is_alive(stuck.pid))
        serving._reap()
        assert next_orders(serving, socket_path, monkeypatch)[NOTES] == {"own": "a note"}
    finally:
        monkeypatch.undo()
        stuck.kill()
        stuck.wait()
        theirs.close()


def test_a_rank_that_answers_and_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(client, "END_SECONDS", 0.05)
    monkeypatch.setattr(client, "_begin", lambda *_: (ours, client.STARTED))
    with theirs:
        send(theirs, pack_answer({"finished": True}))
        assert run_rank("a:b", {}, "key") == {"finished": True}


@pytest.mark.parametrize(
    "failure", [FileNotFoundError("/bin/sh"), subprocess.CalledProcessError(2, "/bin/sh"), None]
)
def test_a_server_that_does_not_start_leaves_no_socket(
    monkeypatch: pytest.MonkeyPatch, socket_path: Path, failure: Exception | None
) -> None:
    def run(*_: object, **__: object) -> None:
        if failure is not None:
            raise failure

    monkeypatch.setattr(tempfile, "tempdir", str(socket_path.parent))
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(Unavailable, match="/bin/sh" if failure else "refused"):
        run_rank("a:b", {}, "key")
    assert not client._socket_path("key").exists()


def test_the_sockets_of_servers_that_were_killed_are_removed(
    serving: Server, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, mine = socket_path.with_name("dead"), socket_path.with_name("mine")
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(dead))
    with socket.socket(socket.AF_UNIX) as started:

        def start(target: str, path: Path) -> None:
            started.bind(str(path))
            started.listen()

        monkeypatch.setattr(client, "_start_server", start)
        client._connect("module:function", mine).close()
    assert sorted(path.name for path in mine.parent.iterdir()) == ["mine", "socket"]
    serving._accept()  # The question whether it lives costs a server nothing.
    assert not serving._children


def test_a_server_that_does_not_listen_yet_is_not_taken_for_a_dead_one(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run removes dead sockets under the lock of the folder, so a socket is made under it too."""
    monkeypatch.setattr(tempfile, "tempdir", str(socket_path.parent))
    monkeypatch.delenv(client.OFF_VARIABLE, raising=False)
    held: list[bool] = []

    def prepare(target: str, path: Path, *, keeper: int) -> None:
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.append(True)
        finally:
            os.close(descriptor)
        raise Unavailable

    monkeypatch.setattr(client, "_prepared", prepare)
    client.import_ahead("a:b")
    assert held == [True]
    assert client.key_ahead() == ""
