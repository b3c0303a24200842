"""Append-only logs: a file that grows, or numbered segments that are written once each."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath

from resnet_dist.errors import StorageError
from resnet_dist.runs.storage.protocol import ALWAYS, Permit, Storage, Unreachable

log = logging.getLogger(__name__)

SHIP_SECONDS = 2.0  # between two segments
NUM_READERS = 16  # segments that are read at the same time
PERMIT_SECONDS = 1.0  # for which an answer of the permit holds
NO_SEGMENT = "0"  # the position before the first segment, whose number is 1


class FileLog:
    """A log in one file. A position is a number of bytes. See protocol.Log."""

    poll_seconds = 0.0

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def open(self, permit: Permit = ALWAYS) -> FileLogWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        permit.check(PERMIT_SECONDS)
        _end_torn_line(self._path)
        return FileLogWriter(self._path, permit)

    def read(self, position: str = "") -> tuple[bytes, str]:
        start = int(position or 0)
        try:
            with self._path.open("rb") as file:
                file.seek(start)
                data = file.read()
        except FileNotFoundError:
            return b"", position
        whole = data[: data.rfind(b"\n") + 1]
        return whole, str(start + len(whole))

    def end(self) -> str:
        return str(self._path.stat().st_size) if self._path.exists() else ""


class FileLogWriter:
    """See protocol.LogWriter. Lines wait in memory while it is not known whether they may be written."""

    def __init__(self, path: Path, permit: Permit) -> None:
        self._path, self._permit = path, permit
        self._file = path.open("ab", buffering=0)  # Unbuffered: a reader sees each line at once.
        self._held: list[bytes] = []
        self._lock = threading.Lock()

    def write(self, line: bytes) -> None:
        with suppress(Unreachable):
            self._append(line)

    def flush(self) -> None:
        self._append()
        # The lines are in the file already. A disk that cannot be flushed costs metrics, not the checkpoint.
        with suppress(OSError, ValueError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self._append()
        except StorageError as error:
            raise StorageError(
                f"{len(self._held)} line(s) of {self._path} were not written: {error}"
            ) from None
        finally:
            self._file.close()

    def _append(self, *lines: bytes) -> None:
        with self._lock:
            self._held += lines
            if self._held:
                self._permit.check(PERMIT_SECONDS)
            while self._held:
                self._held = [b"".join(self._held)]
                written = self._file.write(self._held[0])  # A full disk may take a part alone.
                self._held = [rest] if (rest := self._held[0][written:]) else []


class SegmentLog:
    """A log in numbered objects, each of which is written once. A position is the number of a segment."""

    def __init__(self, storage: Storage, name: str) -> None:
        path = PurePosixPath(name)
        self._storage, self._suffix = storage.at(str(path.with_suffix(""))), path.suffix

    def __str__(self) -> str:
        return self._storage.location

    @property
    def poll_seconds(self) -> float:
        return self._storage.poll_seconds

    def open(self, permit: Permit = ALWAYS) -> SegmentWriter:
        return SegmentWriter(self, int(self.end()) + 1, permit)

    def read(self, position: str = "") -> tuple[bytes, str]:
        if not position:
            numbers = self._numbers()
            with ThreadPoolExecutor(NUM_READERS) as pool:
                found = list(pool.map(self.segment, numbers))
            return b"".join(content or b"" for content in found), str(max(numbers, default=NO_SEGMENT))
        number, segments = int(position), []
        # Ask for the next segment by its name: a list costs a store much more.
        while (content := self.segment(number + 1)) is not None:
            segments.append(content)
            number += 1
        return b"".join(segments), str(number)

    def end(self) -> str:
        return str(max(self._numbers(), default=NO_SEGMENT))

    def segment(self, number: int) -> bytes | None:
        return self._storage.read(self._name(number))

    def add(self, number: int, content: bytes) -> bool:
        """Write a segment; return False where another writer has written one of that number."""
        return self._storage.create(self._name(number), content)

    def _name(self, number: int) -> str:
        return f"{number:08d}{self._suffix}"

    def _numbers(self) -> list[int]:
        stems = [PurePosixPath(found.name).stem for found in self._storage.objects()]
        return [int(stem) for stem in stems if stem.isdecimal()]


class SegmentWriter:
    """Collects lines and writes them as a segment every SHIP_SECONDS, from a thread. See protocol.LogWriter."""

    def __init__(self, log: SegmentLog, number: int, permit: Permit) -> None:
        self._log, self._number, self._permit = log, number, permit
        self._lines: list[bytes] = []
        self._segment = b""  # Kept as it is until it is written: a request that failed may have written it.
        self._has_begun = self._taken_over = False
        self._lock = threading.Lock()
        self._shipping = threading.Lock()
        self._closed, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._ship_all, name="segments", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        if self._taken_over:
            raise self._error()
        with self._lock:
            self._lines.append(line)
        self._wake.set()

    def flush(self) -> None:
        with self._shipping:
            if self._segment:
                self._ship()  # the rest of a try that failed
            with self._lock:
                self._segment = b"".join(self._lines)
                self._lines.clear()
            if self._segment:
                self._ship()

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        self._thread.join()
        self.flush()

    def _ship(self) -> None:
        if self._taken_over:
            raise self._error()
        self._permit.check(PERMIT_SECONDS)
        while not self._log.add(self._number, self._segment):
            # A request of a writer that was killed may have arrived after this one had counted the segments.
            if self._has_begun and not self._permit.decides:
                self._taken_over = True
                raise self._error()
            self._permit.check()
            self._number += 1
        self._has_begun = True
        self._number += 1
        self._segment = b""

    def _error(self) -> StorageError:
        return StorageError(f"{self._log}: another attempt of this run writes its metrics now")

    def _ship_all(self) -> None:
        failed = False
        while not self._closed.is_set():
            self._wake.wait()
            self._wake.clear()
            try:
                self.flush()
                failed = False
            except Unreachable as error:  # Keep the lines; the next segment has them.
                self._wake.set()
                if not failed:
                    log.warning("metrics wait for their storage: %s", error)
                failed = True
            except StorageError as error:
                log.error("metrics are not recorded from here on: %s", error)
                return
            self._closed.wait(SHIP_SECONDS)


def _end_torn_line(path: Path) -> None:
    """End the half line that a killed writer may have left, so that the next line is whole."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read() != b"\n":
                file.write(b"\n")
