"""Import what a rank imports, then become a rank as often as one is asked for: by a copy of this process.

    python -m resnet_dist.launch.preload.server MODULE:FUNCTION SOCKET DESCRIPTOR KEEPER

It ends soon after its last rank, and at once where the run is finished or the process KEEPER, Ray's on this node, has
gone. It has one thread, holds no GPU and opens nothing of the run: a copy would share that.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from resnet_dist.launch.preload.wire import (
    NUM_STREAMS,
    STARTED,
    locked,
    pack_answer,
    pack_error,
    receive,
    receive_streams,
    send,
)

IDLE_SECONDS = 60.0  # after its last rank: those of the next attempt come within seconds, or not at all
REQUEST_SECONDS = 10.0  # for a client to send its request
# Imported on top of what the module of the function imports: the first optimizer would import it.
ALSO = ("torch._dynamo",)
PR_SET_PDEATHSIG = 1
Function = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass
class Child:
    """A rank: its process, and the connection to the client that waits for it."""

    pid: int
    connection: socket.socket


class Server:
    """Copies this process for every client that connects, until there has been none for a while."""

    def __init__(self, function: Function, listener: socket.socket, path: Path, keeper: int) -> None:
        self._function, self._listener, self._path = function, listener, path
        self._children: dict[int, Child] = {}  # by process
        self._selector = selectors.DefaultSelector()
        self._finished = False  # the newest rank to end, and so the run
        self._keeper: int | None = None  # a descriptor that is ready when the process has gone
        self._is_left = False
        # A child that ends interrupts the wait for clients.
        self._wakeup, self._wakeup_end = socket.socketpair()
        for end in (self._wakeup, self._wakeup_end):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        signal.set_wakeup_fd(self._wakeup_end.fileno())
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        with suppress(OSError, AttributeError):  # only Linux has it
            self._keeper = os.pidfd_open(keeper)
            self._selector.register(self._keeper, selectors.EVENT_READ)

    def serve(self) -> None:
        """Return when this process is no longer needed."""
        while not (self._is_done() and self._has_left()):
            wait = None if self._children else IDLE_SECONDS
            ready = [key.fileobj for key, _ in self._selector.select(wait)]
            if not ready and not self._children and self._has_left():
                return
            for connection in ready:
                if connection == self._keeper:
                    self._selector.unregister(connection)
                    self._is_left = True
                elif connection is self._wakeup:
                    with suppress(BlockingIOError):
                        self._wakeup.recv(1024)
                elif connection is not self._listener:
                    self._end_rank_of(connection)
            self._reap()
            if self._listener in ready:
                self._accept()

    def _is_done(self) -> bool:
        return (self._finished or self._is_left) and not self._children

    def _has_left(self) -> bool:
        """Remove the socket, and report that nobody has connected to it meanwhile."""
        with locked(self._path.parent), selectors.DefaultSelector() as probe:
            probe.register(self._listener, selectors.EVENT_READ)
            if probe.select(0):
                return False
            with suppress(FileNotFoundError):
                self._path.unlink()
            return True

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(REQUEST_SECONDS)
        try:
            streams, request = receive_streams(connection), receive(connection)
            if request is None or len(streams) < NUM_STREAMS:
                raise OSError
            connection.settimeout(None)
        except OSError:
            connection.close()
            return
        self._finished = False
        pid = os.fork()
        if pid == 0:
            self._become_rank(connection, streams, json.loads(request))
        for stream in streams:
            os.close(stream)
        self._children[pid] = Child(pid, connection)
        self._selector.register(connection, selectors.EVENT_READ)
        with suppress(OSError):  # A client that has gone is seen by the selector.
            send(connection, STARTED)

    def _end_rank_of(self, connection: Any) -> None:
        """Kill the rank whose client has gone: Ray has ended it, or its place in the cluster."""
        for child in self._children.values():
            if child.connection is connection:
                self._selector.unregister(connection)
                os.kill(child.pid, signal.SIGKILL)
                # Wait: its memory, of a GPU too, is needed by the next rank.
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                child = self._children.pop(ended[0], None)
                if child is None:
                    continue
                self._finished = ended[1] == 0
                with suppress(KeyError):
                    self._selector.unregister(child.connection)
                child.connection.close()

    def _become_rank(
        self, connection: socket.socket, streams: list[int], request: dict[str, Any]
    ) -> NoReturn:
        """Carry out a request in this process, a copy, and exit: 0 where the run is finished."""
        code = 1
        try:
            _end_with_parent()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._selector.close()
            for other in (self._listener, self._wakeup, self._wakeup_end):
                other.close()
            for child in self._children.values():
                child.connection.close()
            if self._keeper is not None:
                os.close(self._keeper)
            for number, stream in enumerate(streams, start=1):
                os.dup2(stream, number)
                os.close(stream)
            os.environ.clear()
            os.environ.update(request["environment"])
            with suppress(OSError):
                os.chdir(request["folder"])
            code = _answer(self._function, request["orders"], connection)
        finally:
            for output in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    output.flush()
            os._exit(code)


def _end_with_parent() -> None:
    """Let the system kill this process when its parent, which watches over it, has ended."""
    parent = os.getppid()
    with suppress(OSError, AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _answer(function: Function, orders: dict[str, Any], connection: socket.socket) -> int:
    """Send what the function returns or raises; return the exit code."""
    try:
        answer = function(orders)
        message = pack_answer(answer)
    except BaseException as error:
        send(connection, pack_error(error))
        return 1
    send(connection, message)
    return 0 if answer.get("finished") else 1


def main(target: str, path: str, descriptor: str, keeper: str) -> None:
    try:
        function = _import(target)
    except BaseException:  # Clients that wait see the connection end.
        Path(path).unlink(missing_ok=True)
        raise
    gc.collect()
    gc.freeze()  # Garbage collection in the copies would write to the memory that they share.
    Server(function, socket.socket(fileno=int(descriptor)), Path(path), int(keeper)).serve()


def _import(target: str) -> Function:
    module, _, name = target.partition(":")
    function: Function = getattr(importlib.import_module(module), name)
    if "torch" in sys.modules:
        for also in ALSO:
            importlib.import_module(also)
    if _uses_gpu():
        raise SystemExit(
            "an import has used a GPU, and copies of this process could not: each rank imports for itself"
        )
    return function


def _uses_gpu() -> bool:
    """Report whether CUDA's driver is in this process: torch loads it with the first call that needs a GPU."""
    try:
        return "libcuda.so" in Path("/proc/self/maps").read_text()
    except OSError:
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
