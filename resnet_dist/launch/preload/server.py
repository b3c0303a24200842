"""Import what a rank imports, then become a rank as often as one is asked for: by a copy of this process.

    python -m resnet_dist.launch.preload.server MODULE:FUNCTION SOCKET DESCRIPTOR KEEPER

It ends soon after its last rank, and at once where the run is finished or the process KEEPER, Ray's on this node or the
driver, has gone. It has one thread, holds no GPU and opens nothing of the run: a copy would share that.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import platform
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from resnet_dist.launch.preload.copies import Child, Function, answer, end_with_parent, has_ended, stand_as
from resnet_dist.launch.preload.wire import (
    NOTES,
    NUM_STREAMS,
    STARTED,
    locked,
    pack_end,
    pack_refusal,
    receive,
    receive_streams,
    send,
)
from resnet_dist.system.memory import collect_rarely

IDLE_SECONDS = 60.0  # after its last rank: those of the next attempt come within seconds, or not at all
REQUEST_SECONDS = 10.0  # for a client to send its request
# For a killed rank to end. One that waits for a device or a storage that does not answer cannot end before it answers.
DEATH_SECONDS = 30.0
PAUSE_SECONDS = 0.05
# Imported on top of what the module of the function imports: DistributedDataParallel would import it.
ALSO = ("torch._dynamo",)


class Server:
    """Copies this process for every client that connects, until there has been none for a while."""

    def __init__(self, function: Function, listener: socket.socket, path: Path, keeper: int) -> None:
        self._function, self._listener, self._path = function, listener, path
        self._children: dict[int, Child] = {}  # by process
        self._selector = selectors.DefaultSelector()
        # Ranks that did not end when they were killed, by process: what the next ranks report, since nobody reads the
        # output of a server.
        self._unended: dict[int, str] = {}
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
            gone: list[Any] = []
            for connection in ready:
                if connection == self._keeper:
                    self._selector.unregister(connection)
                    self._is_left = True
                elif connection is self._wakeup:
                    with suppress(BlockingIOError):
                        self._wakeup.recv(1024)
                elif connection is not self._listener:
                    gone.append(connection)
            self._end_ranks_of(gone)
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
        """Start a rank for the next client. One that cannot be served is refused; the other ranks train on."""
        try:
            connection, _ = self._listener.accept()
        except OSError:  # The client has gone, or there is no free descriptor: one may be soon.
            time.sleep(PAUSE_SECONDS)
            return
        streams: list[int] = []
        try:
            connection.settimeout(REQUEST_SECONDS)
            streams = receive_streams(connection)
            request = receive(connection)
            if request is None or len(streams) < NUM_STREAMS:
                raise OSError("the request is not complete")
            connection.settimeout(None)
            self._copy(connection, streams, json.loads(request))
        except (OSError, ValueError) as error:
            with suppress(OSError):
                send(connection, pack_refusal(str(error)))
            connection.close()
        finally:
            for stream in streams:
                os.close(stream)

    def _copy(self, connection: socket.socket, streams: list[int], request: dict[str, Any]) -> None:
        """Let a copy of this process become the rank. Raises OSError where the system allows no further process."""
        self._finished = False
        # With the host: containers on several hosts have the same numbers of processes.
        notes = {f"unended-{platform.node()}-{pid}": sentence for pid, sentence in self._unended.items()}
        orders = request.setdefault("orders", {})
        orders[NOTES] = {**orders.get(NOTES, {}), **notes}
        pid = os.fork()
        if pid == 0:
            self._become_rank(connection, streams, request)
        self._children[pid] = Child(pid, connection)
        self._selector.register(connection, selectors.EVENT_READ)
        with suppress(OSError):  # A client that has gone is seen by the selector.
            send(connection, STARTED)

    def _end_ranks_of(self, connections: list[Any]) -> None:
        """Kill the ranks whose clients have gone: Ray has ended them, or their places in the cluster."""
        killed = [child for child in self._children.values() if child.connection in connections]
        for child in killed:
            self._selector.unregister(child.connection)
            os.kill(child.pid, signal.SIGKILL)
        # Wait: their memory, of a GPU too, is needed by the next ranks.
        deadline = time.monotonic() + DEATH_SECONDS
        while alive := [child for child in killed if not has_ended(child.pid)]:
            if time.monotonic() >= deadline:
                return self._give_up(alive)
            time.sleep(PAUSE_SECONDS)

    def _give_up(self, children: list[Child]) -> None:
        """Continue without ranks that do not end, so that the next ones need not wait for them."""
        for child in children:
            self._unended[child.pid] = (
                f"process {child.pid} of an earlier rank on {platform.node()} has not ended within {DEATH_SECONDS:g} s of its "
                "SIGKILL: it waits for a device or a storage, and may hold memory"
            )
            print(self._unended[child.pid], file=sys.stderr, flush=True)
            del self._children[child.pid]
            child.connection.close()

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                child = self._children.pop(ended[0], None)
                self._unended.pop(ended[0], None)
                if child is None:
                    continue
                self._finished = ended[1] == 0
                with suppress(KeyError):
                    self._selector.unregister(child.connection)
                with suppress(OSError):
                    send(child.connection, pack_end(ended[1]))
                child.connection.close()

    def _become_rank(
        self, connection: socket.socket, streams: list[int], request: dict[str, Any]
    ) -> NoReturn:
        """Carry out a request in this process, a copy, and exit: 0 where the run is finished."""
        code = 1
        try:
            end_with_parent()
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
            # A crash shows where. The thread that crashes alone: a hundred stacks of data loading would hide it.
            faulthandler.enable(2, all_threads=False)
            stand_as(request)
            os.environ.clear()
            os.environ.update(request["environment"])
            with suppress(OSError):
                os.chdir(request["folder"])
            code = answer(self._function, request["orders"], connection)
        finally:
            for output in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    output.flush()
            os._exit(code)


def main(target: str, path: str, descriptor: str, keeper: str) -> None:
    collect_rarely()
    try:
        with _ending_with(int(keeper), Path(path)):
            function = _import(target)
    except BaseException:  # Clients that wait see the connection end.
        Path(path).unlink(missing_ok=True)
        raise
    gc.collect()
    gc.freeze()  # Garbage collection in the copies would write to the memory that they share.
    Server(function, socket.socket(fileno=int(descriptor)), Path(path), int(keeper)).serve()


@contextmanager
def _ending_with(keeper: int, path: Path) -> Iterator[None]:
    """End inside the block when the keeper ends, where it is the parent; after it, `Server` sees that by itself."""

    def end(*_: object) -> NoReturn:
        path.unlink(missing_ok=True)
        os._exit(1)

    if keeper != os.getppid():
        try:
            os.kill(keeper, 0)
        except ProcessLookupError:  # It ended before this process began.
            end()
        yield
        return

    signal.signal(signal.SIGTERM, end)
    end_with_parent(signal.SIGTERM)
    yield
    end_with_parent(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
