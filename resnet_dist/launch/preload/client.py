"""Ask for a process that trains as a rank, and wait for its end. Imports neither torch nor Ray.

The server for a key is found by its socket, in a folder that belongs to this user alone. Where there is none, it is
started, apart from this process: a rank that is killed must not take it away.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from resnet_dist.launch.preload.copies import standing
from resnet_dist.launch.preload.wire import (
    STARTED,
    end_in,
    locked,
    receive,
    refusal_in,
    send,
    send_streams,
    unpack,
)
from resnet_dist.search_path import SAFE_PATH_VARIABLE

SERVER = "resnet_dist.launch.preload.server"
RANK = "resnet_dist.launch.rank:carry_out"  # the function that a rank calls
OFF_VARIABLE = "RESNET_DIST_PRELOAD"  # of the driver; "0": every rank imports for itself
END_SECONDS = 30.0  # for the process of a rank that has answered to end
MAX_PATH = 100  # in bytes; a longer path of a socket is cut off


class Unavailable(Exception):
    """No process could be started for the rank here; the rank can still run in this one."""


class Died(Exception):
    """The process of the rank ended without an answer: it was killed, or crashed. The text names the signal."""


# The key of what this process has started, and its server; empty where there is none.
_ahead: list[tuple[str, subprocess.Popen[bytes]]] = []


def is_on() -> bool:
    """Report whether the person who started this process wants ranks that are copies."""
    return os.environ.get(OFF_VARIABLE) != "0"


def import_ahead(target: str = RANK) -> None:
    """Start what ranks on this machine will be copies of, while this process imports what it needs itself.

    It ends with the thread that calls this. Where it cannot be started, ranks start one, as on other machines.
    """
    if _ahead or not is_on():
        return
    key = f"{os.getpid()} {uuid.uuid4().hex}"
    with suppress(OSError, Unavailable):
        path = _socket_path(key)
        # Another process would take a socket that does not listen yet for a dead one.
        with locked(path.parent):
            command, listener, environment = _prepared(target, path, keeper=os.getpid())
        with listener:
            # Of a session of its own: Ctrl-C is for this process. What it has to say, the ranks find out themselves.
            process = subprocess.Popen(
                command,
                # As Ray sets it for its processes, which start the other servers.
                env={"OMP_NUM_THREADS": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(listener.fileno(),),
                start_new_session=True,
            )
        _ahead.append((key, process))


def key_ahead() -> str:
    """Return the key of what this process has started; empty where there is nothing."""
    return _ahead[0][0] if _ahead else ""


def run_rank(target: str, orders: dict[str, Any], key: str) -> dict[str, Any]:
    """Call `target`, "module:function", with the orders in a copy of the process that has imported that module.

    key: names that process on this machine. Raises what the function raises, Unavailable, or Died.
    """
    try:
        connection, message = _begin(target, orders, _socket_path(key))
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(str(error)) from error
    with connection:
        answer = receive(connection) if message == STARTED else message
        end = end_in(answer)
        if answer is None or end is not None:
            raise Died(end)
        connection.settimeout(END_SECONDS)
        with suppress(TimeoutError):  # The server kills a rank whose client closes the connection.
            while receive(connection) is not None:  # The process has ended once nobody holds the other end.
                pass
    return unpack(answer)


def _begin(target: str, orders: dict[str, Any], path: Path) -> tuple[socket.socket, bytes]:
    """Send the request; return the connection and its first message. Raises OSError where there is none."""
    connection = _connect(target, path)
    try:
        send_streams(connection)
        request = {"orders": orders, "environment": dict(os.environ), "folder": os.getcwd(), **standing()}
        send(connection, json.dumps(request).encode())
        message = receive(connection)
        if message is None:
            raise ConnectionAbortedError("the process that imports has ended")
        if (reason := refusal_in(message)) is not None:
            raise ConnectionAbortedError(f"the process that imports cannot copy itself: {reason}")
    except BaseException:
        connection.close()
        raise
    return connection, message


def _socket_path(key: str) -> Path:
    """Return the path of the server's socket. Raises Unavailable where others could put something there."""
    folder = Path(tempfile.gettempdir()) / f"resnet-dist-{os.getuid()}" / "ranks"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    owners = {folder.stat().st_uid, folder.parent.stat().st_uid}
    if owners != {os.getuid()} or folder.stat().st_mode & 0o077 or len(os.fsencode(path)) > MAX_PATH:
        raise Unavailable(f"{folder} cannot hold the socket")
    return path


def _connect(target: str, path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        with locked(path.parent):
            try:
                connection.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                _remove_dead(path.parent)
                try:
                    _start_server(target, path)
                    connection.connect(str(path))  # It is answered once the server has imported everything.
                except BaseException:
                    path.unlink(missing_ok=True)
                    raise
    except BaseException:
        connection.close()
        raise
    return connection


def _remove_dead(folder: Path) -> None:
    """Remove the sockets of servers that were killed; each has a name of its own, of a run and a driver."""
    for path in folder.iterdir():
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.setblocking(False)  # A server that does not answer lives.
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)


def _start_server(target: str, path: Path) -> None:
    command, listener, environment = _prepared(target, path, keeper=os.getppid())
    with listener:
        # Through a shell that ends at once: Ray kills the child processes of a process of its own that ends.
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=(listener.fileno(),),
            start_new_session=True,
            check=True,
        )


def _prepared(target: str, path: Path, *, keeper: int) -> tuple[list[str], socket.socket, dict[str, str]]:
    """Return the command of a server, the socket that it listens on, and its environment."""
    with suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    command = [sys.executable, "-m", SERVER, target, str(path), str(listener.fileno()), str(keeper)]
    paths = os.pathsep.join(filter(None, sys.path))
    return command, listener, {**os.environ, "PYTHONPATH": paths, SAFE_PATH_VARIABLE: "1"}
