"""The process that writes a command's log file: lines of libraries, each with its time.

It outlives the command, so it can show the last lines where a fatal error of a library ended the command without
another word. It is a script of its own: it starts in milliseconds and imports nothing of the package but redact.py.

    log_writer.py LINES CONTROL

LINES is the reading end of the pipe that libraries write to. CONTROL is that of a pipe which the command alone holds:
one JSON object a line, {"log": PATH} or {"end": NAME of an End}; it closes with the command, whatever ended that.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import selectors
import signal
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

MAX_LOG_BYTES = 4 * 2**20  # A full file is renamed to OLD; the one before it is removed.
MAX_EARLY_BYTES = 2**20  # of the lines that are kept in memory, before the file is known
MAX_LINE_BYTES = 10_000
SHOWN_LINES, SHOWN_SECONDS = 20, 10.0  # after a fatal error: the last lines of its last seconds
OLD = "-old"


class LogFile:
    """The lines of one command, in memory until a file for them is known."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.written: list[Path] = []  # all files with lines of this command
        self.recent: deque[tuple[float, str]] = deque(maxlen=SHOWN_LINES)
        self._early: list[str] = []
        self._early_bytes = self._num_lost = 0

    def move_to(self, path: Path) -> None:
        self.path = path
        early, self._early, self._early_bytes = self._early, [], 0
        for line in early:
            self._write(line)

    def add(self, text: str) -> None:
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)) + f".{int(now % 1 * 1000):03d}"
        self.recent.append((time.monotonic(), text))
        self._write(f"{stamp} {text}\n")

    def end(self) -> None:
        """Write what is still in memory to a temporary file."""
        if self._early:
            number, name = tempfile.mkstemp(prefix="resnet-dist-log-", suffix=".txt")
            os.close(number)
            self.move_to(Path(name))

    def _write(self, line: str) -> None:
        if self.path is None:
            self._keep(line)
            return
        try:
            if self.path.exists() and self.path.stat().st_size > MAX_LOG_BYTES:
                self.path.replace(self.path.with_stem(self.path.stem + OLD))
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                if self._num_lost:
                    file.write(f"(before this line {self._num_lost} are lost)\n")
                file.write(line)
        except OSError:  # The disk is full, or the folder has gone.
            self._num_lost += 1
            return
        self._num_lost = 0
        if self.path not in self.written:
            self.written.append(self.path)

    def _keep(self, line: str) -> None:
        self._early.append(line)
        self._early_bytes += len(line)
        while self._early_bytes > MAX_EARLY_BYTES:
            self._early_bytes -= len(self._early.pop(0))
            self._num_lost += 1


class Writer:
    """Reads both pipes until the command has ended, then shows what its end calls for."""

    def __init__(self, lines: int, control: int) -> None:
        self._lines, self._control = lines, control
        self._log, self._redact = LogFile(), _load_redact()
        self._line, self._order = b"", b""  # the beginnings of a line of each pipe
        self._end: str | None = None

    def run(self) -> None:
        os.set_blocking(self._lines, False)
        selector = selectors.DefaultSelector()
        selector.register(self._lines, selectors.EVENT_READ)
        selector.register(self._control, selectors.EVENT_READ)
        is_open = True
        while is_open:
            ready = {key.fd for key, _ in selector.select()}
            if self._lines in ready and not self._read_lines():
                selector.unregister(self._lines)
            if self._control in ready:
                is_open = self._read_orders()
        while self._read_lines():
            pass
        if self._line:
            self._add(self._line)
        self._show_end()

    def _read_lines(self) -> bool:
        """Read what is there; return False where there is nothing, or the pipe has been closed."""
        try:
            data = os.read(self._lines, 2**16)
        except OSError:
            return False
        *lines, self._line = (self._line + data).split(b"\n")
        if len(self._line) > MAX_LINE_BYTES:
            lines, self._line = [*lines, self._line], b""
        for line in lines:
            self._add(line)
        return bool(data)

    def _add(self, line: bytes) -> None:
        # A progress bar writes one line again and again: keep its last state.
        text = line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="backslashreplace").rstrip()
        if text:
            self._log.add(self._redact(text))

    def _read_orders(self) -> bool:
        """Follow the command's orders; return False once it has ended."""
        data = os.read(self._control, 2**16)
        *orders, self._order = (self._order + data).split(b"\n")
        for order in map(json.loads, orders):
            if "log" in order:
                while self._read_lines():  # What was written before belongs to the file before.
                    pass
                self._log.move_to(Path(order["log"]))
            self._end = order.get("end", self._end)
        return bool(data)

    def _show_end(self) -> None:
        if self._end == "silent":
            return
        self._log.end()
        where = ", ".join(_short(path) for path in self._log.written)
        recent = [text for _, text in self._log.recent]
        if self._end is None:  # The command could not name its end: something killed it.
            oldest = time.monotonic() - SHOWN_SECONDS
            recent = [text for at, text in self._log.recent if at >= oldest]
            if recent:
                _show(
                    "error: the command was killed, or a fatal error of a library ended it; the last lines:"
                )
        if self._end != "named":
            for text in recent:
                _show(f"  {text}")
        if where:
            _show(f"details: {where}")


def _show(text: str) -> None:
    with contextlib.suppress(OSError):  # The terminal has gone.
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def _short(path: Path) -> str:
    with contextlib.suppress(OSError):
        if path.is_relative_to(Path.cwd()):
            return str(path.relative_to(Path.cwd()))
    return str(path)


def _load_redact() -> Any:
    """Load the function from its file: an import of the package would read far more."""
    spec = importlib.util.spec_from_file_location("redact", Path(__file__).with_name("redact.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.redact


if __name__ == "__main__":
    # Ray Jobs signals every descendant of a job's command: this one ends with the command, whose end it must show.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Writer(int(sys.argv[1]), int(sys.argv[2])).run()
