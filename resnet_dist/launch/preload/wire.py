"""The messages between a rank's Ray process and the server: a length, then as many bytes."""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
import socket
import struct
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LENGTH = struct.Struct("!Q")
STARTED = b"started"  # the first message to the client: there is a process for its rank
# These begin the other messages of the server itself; the messages of a rank are pickled.
_REFUSED, _ENDED = b"refused ", b"ended "
NOTES = "notes"  # in the orders: sentences by key, which the rank writes where its driver shows them
NUM_STREAMS = 2  # stdout and stderr of the client, which the rank writes to


def send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(message)) + message)


def receive(connection: socket.socket) -> bytes | None:
    """Return the next message, or None where the other side has gone."""
    header = _exactly(connection, _LENGTH.size)
    return None if header is None else _exactly(connection, _LENGTH.unpack(header)[0])


def send_streams(connection: socket.socket) -> None:
    """Send the standard output and the standard error of this process."""
    socket.send_fds(connection, [b"\0"], [1, 2])


def receive_streams(connection: socket.socket) -> list[int]:
    """Return copies of the client's streams; fewer than NUM_STREAMS where it has gone."""
    return list(socket.recv_fds(connection, 1, NUM_STREAMS)[1])


def pack_error(error: BaseException) -> bytes:
    """Return an exception in a form that can be sent, with its traceback as a note."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        packed = pickle.dumps((error, None))
        pickle.loads(packed)
    except Exception:  # An exception whose class takes other arguments cannot be unpacked.
        named = RuntimeError(f"{type(error).__name__}: {error}")
        named.__notes__ = error.__notes__
        packed = pickle.dumps((named, None))
    return packed


def pack_answer(answer: dict[str, Any]) -> bytes:
    return pickle.dumps((None, answer))


def pack_refusal(reason: str) -> bytes:
    """Return the message to a client that gets no rank."""
    return _REFUSED + reason.encode()


def refusal_in(message: bytes) -> str | None:
    """Return why there is no rank, or None where the message is another one."""
    return message.removeprefix(_REFUSED).decode() if message.startswith(_REFUSED) else None


def pack_end(status: int) -> bytes:
    """Return the message of a rank's end, which follows its answer. status: as `os.waitpid` returns it."""
    return _ENDED + str(status).encode()


def end_in(message: bytes | None) -> str | None:
    """Describe the end of a rank that has not answered; return None where the message is an answer."""
    if message is None:
        return "the process of the rank and the one that started it have ended"
    if not message.startswith(_ENDED):
        return None
    code = os.waitstatus_to_exitcode(int(message.removeprefix(_ENDED)))
    if code >= 0:
        return f"the process of the rank ended with exit code {code}, without an answer"
    names = {item.value: item.name for item in signal.Signals}
    return f"the process of the rank was ended by {names.get(-code, f'signal {-code}')}"


def unpack(message: bytes) -> dict[str, Any]:
    """Return the answer of a rank, or raise its error. Only this user can write to the socket that it comes from."""
    error, answer = pickle.loads(message)
    if error is not None:
        raise error
    result: dict[str, Any] = answer
    return result


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder with the sockets: one process at a time creates or removes one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        try:
            part = connection.recv(min(size, 2**20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
