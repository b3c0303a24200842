"""Lines for the person, and lines of libraries: two streams that never mix, and that nothing can break.

A library writes to descriptors 1 and 2 from Python, from C++, and from processes that it starts. So `divert` leads both
descriptors to the process that writes the log (log_writer.py), and our own lines go to copies of what they led to
before. These copies never raise: training goes on where a pipe, a terminal or a disk behind them has gone.
"""

from __future__ import annotations

import atexit
import codecs
import errno
import faulthandler
import io
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

# The end of a command, for its log: silent names nothing, named names the file, tail shows the last lines too. Where
# the command gives none, something killed it.
End = Literal["silent", "named", "tail"]

LOG_FILE = "log.txt"  # in the run folder
LOG_WRITER = Path(__file__).with_name("log_writer.py")
WRITER_SECONDS = 2.0  # the wait at the end of a command for the end of its log
PIPE_BYTES = 2**20
ERRORS = "resnet_dist.person"  # the name of `_replace` among codecs
# Signs that messages use, for a terminal that shows ASCII alone.
ASCII = {
    "…": "...",
    "–": "-",
    "—": "-",
    "×": "x",
    "·": "-",
    "→": "->",
    "━": "-",
    "─": "-",
    "•": "*",
    "’": "'",
}


class PersonFile(io.FileIO):
    """A descriptor that a person reads. Writing to it never raises; what it does not take is handed to `on_lost`."""

    def __init__(self, number: int, on_lost: Callable[[PersonFile, bytes], None]) -> None:
        super().__init__(number, "w", closefd=False)
        self._on_lost = on_lost
        self.failure: OSError | None = None
        self.was_reported = False

    def write(self, data: Any) -> int:
        while self.failure is None:
            try:
                written = super().write(data)
            except OSError as error:
                self.failure = error
                continue
            if written is not None:
                return written
            # Another program made it non-blocking: wait for its reader.
            select.select([], [self.fileno()], [])
        self._on_lost(self, bytes(data))
        return memoryview(data).nbytes


@dataclass
class Streams:
    """The person's streams of this process, and the log of libraries."""

    out: TextIO
    err: TextIO
    out_file: PersonFile
    err_file: PersonFile
    needs_stdout: bool = False  # the result of the command is what it prints
    end: End | None = None
    control: int | None = None  # the pipe to the log's writer
    writer: subprocess.Popen[bytes] | None = None

    @property
    def is_diverted(self) -> bool:
        return self.control is not None


_streams: Streams | None = None


def take_streams() -> Streams:
    """Make the standard streams of this process the person's, and safe. Call it first in `main`, once."""
    global _streams
    codecs.register_error(ERRORS, _replace)
    closed = _open_missing()
    files = []
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if stream is not None:
            with suppress(OSError):
                stream.flush()
        file = PersonFile(os.dup(number), _lost)
        if number in closed:
            file.failure = OSError(errno.EBADF, "it is closed")
        files.append(file)
    out, err = (
        io.TextIOWrapper(
            io.BufferedWriter(file),
            encoding=getattr(stream, "encoding", None) or "utf-8",
            errors=ERRORS,
            line_buffering=True,
        )
        for file, stream in zip(files, (sys.stdout, sys.stderr), strict=True)
    )
    sys.stdout, sys.stderr = out, err
    _streams = Streams(out, err, files[0], files[1])
    return _streams


def person_stream(*, stderr: bool) -> TextIO:
    """Return the stream that the person reads: the process's own where `take_streams` was not called, as in tests."""
    if _streams is None:
        return sys.stderr if stderr else sys.stdout
    return _streams.err if stderr else _streams.out


def need_stdout() -> None:
    """State that the result of this command is what it prints, so that it fails where stdout cannot be written."""
    if _streams is not None:
        _streams.needs_stdout = True


def has_reader() -> bool:
    """Report whether stdout still takes what is printed: not after its reader has left, or its disk is full."""
    return _streams is None or _streams.out_file.failure is None


def lost_result() -> OSError | None:
    """Return why a command's result could not be printed; None where it was, or its reader left on purpose."""
    if _streams is None or not _streams.needs_stdout:
        return None
    failure = _streams.out_file.failure
    return None if failure is None or failure.errno == errno.EPIPE else failure


def divert() -> None:
    """Lead what libraries write to the log. Nothing changes where the process for it cannot be started."""
    streams = _streams
    if streams is None or streams.is_diverted:
        return
    lines, lines_end = os.pipe()
    control, control_end = os.pipe()
    command = [sys.executable, "-I", "-S", "-X", "utf8", str(LOG_WRITER), str(lines), str(control)]
    try:
        # In a session of its own: a signal from the terminal must not end it before the command.
        streams.writer = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=streams.err_file.fileno(),
            pass_fds=(lines, control),
            start_new_session=True,
        )
    except (OSError, ValueError):
        for number in (lines, lines_end, control, control_end):
            os.close(number)
        return
    os.close(lines)
    os.close(control)
    _enlarge(lines_end)
    os.dup2(lines_end, 1)
    os.dup2(lines_end, 2)
    os.close(lines_end)
    streams.control = control_end
    # A forked process that outlives the command must not hold this: its end is how the writer sees ours.
    os.register_at_fork(after_in_child=_forget_control)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.FileIO(number, "w", closefd=False), "utf-8", "backslashreplace", write_through=True
        )
        for number in (1, 2)
    )
    faulthandler.enable(streams.err_file.fileno())
    atexit.register(end_log)  # Registered before those of libraries, it runs after them.


@contextmanager
def shown() -> Iterator[None]:
    """Show the person everything that is printed inside, as the recipe is: it is the person's own code."""
    streams = _streams
    if streams is None or not streams.is_diverted:
        yield
        return
    before = (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = streams.out, streams.err
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def log_to(path: Path) -> None:
    """Keep from here on, and what was written so far, in this file."""
    _order({"log": os.path.abspath(path)})


def set_end(end: End) -> None:
    """Name the end that the command comes to, which decides what its log shows the person. The first call decides."""
    if _streams is not None and _streams.end is None:
        _streams.end = end
        _order({"end": end})


def end_log() -> None:
    """End the log: what libraries write from here on is dropped. Call it last, where Python does not call it."""
    streams = _streams
    if streams is None or streams.control is None:
        return
    null = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(null, number)
    os.close(null)
    _forget_control()
    if streams.writer is not None:
        with suppress(subprocess.TimeoutExpired):
            streams.writer.wait(WRITER_SECONDS)


def _order(order: dict[str, str]) -> None:
    if _streams is not None and _streams.control is not None:
        with suppress(OSError):  # The writer was killed.
            os.write(_streams.control, f"{json.dumps(order)}\n".encode())


def _forget_control() -> None:
    if _streams is not None and _streams.control is not None:
        control, _streams.control = _streams.control, None
        os.close(control)


def _lost(file: PersonFile, data: bytes) -> None:
    """Put what a stream did not take into the log, and report on stderr, once, that stdout takes nothing any more."""
    streams = _streams
    if streams is None:
        return
    if streams.is_diverted:
        with suppress(OSError):
            os.write(1, data)
    if file is streams.out_file and not file.was_reported and file.failure is not None:
        file.was_reported = True
        where = ", and its lines go to its log" if streams.is_diverted else ""
        streams.err.write(f"stdout: {file.failure.strerror}; the command continues{where}\n")


def _open_missing() -> set[int]:
    """Open /dev/null for each standard stream that was closed: the next file would get its number, and our lines."""
    closed = set()
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            closed.add(number)
            os.open(os.devnull, os.O_RDWR)  # It gets the lowest free number, which is this one.
    return closed


def _enlarge(pipe: int) -> None:
    with suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that a terminal cannot show: signs by ASCII ones, all others by their escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(sign) or _escaped(sign) for sign in text), error.end


def _escaped(sign: str) -> str:
    # A byte of a file name that is not UTF-8.
    return f"\\x{ord(sign) - 0xDC00:02x}" if "\udc80" <= sign <= "\udcff" else ascii(sign)[1:-1]
