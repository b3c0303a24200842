"""The run's storage as a rank sees it: whether it is the driver's, stop requests there, and reports of stalls."""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Mapping
from queue import SimpleQueue

from resnet_dist.errors import StorageError, TrainingError
from resnet_dist.launch.attempt import Attempt
from resnet_dist.runs.folder import STOP_FILE, token_name
from resnet_dist.runs.stalls import write_stall
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import PERMIT_WAIT_SECONDS, Storage, Unreachable
from resnet_dist.system.streams import person_stream
from resnet_dist.train.watch.watchdog import StallReport
from resnet_dist.world import World

log = logging.getLogger(__name__)

# The driver's token must be seen within this time: a network file system may show it late.
TOKEN_SECONDS, TOKEN_POLL_SECONDS = 5.0, 0.2
STALL_RETRY_SECONDS = 5.0  # What stalls the ranks may be this storage.


def check_shared(attempt: Attempt, world: World) -> None:
    """Raise TrainingError, on all ranks, where a rank does not see the storage that the driver writes to.

    A collective. Such ranks would train, and their checkpoints and metrics would lie where nobody looks for them. Raises
    Unreachable, on all ranks, where the storage does not answer one: then the ranks start again.
    """
    problems = enumerate(world.gather((platform.node(), _problem_of(attempt))))
    found = [(problem, f"rank {rank} on {host}: {problem}") for rank, (host, problem) in problems if problem]
    for problem, sentence in found:
        if not isinstance(problem, Unreachable):
            raise TrainingError(sentence)
    for _, sentence in found:
        raise Unreachable(sentence)


def _problem_of(attempt: Attempt) -> str | Unreachable | None:
    """Return what keeps this rank from the driver's storage; None where nothing does."""
    begin, pause = time.monotonic(), threading.Event()
    deadline, token_deadline = begin + PERMIT_WAIT_SECONDS, begin + TOKEN_SECONDS
    while True:
        try:
            if open_storage(attempt.folder).read(token_name(attempt.token)) is not None:
                return None
            if time.monotonic() >= token_deadline:
                return (
                    f"{attempt.folder} is not the one that the driver on {attempt.host} writes to; --output must be a folder "
                    "that all nodes share, or a URL such as s3://BUCKET/PREFIX"
                )
        # What took the ranks of the last attempt away may have taken the storage away, too.
        except Unreachable as error:
            if time.monotonic() >= deadline:
                return error
            token_deadline = time.monotonic() + TOKEN_SECONDS
        except StorageError as error:
            return str(error)
        pause.wait(TOKEN_POLL_SECONDS)


class StopWatch:
    """Looks for the object by which the driver requests a stop, in a thread: storage may take long to answer.

    It notices a run that is removed while it is trained, too.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._requested, self._gone, self._closed = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._look, name="stop", daemon=True)
        self._thread.start()

    def requested(self) -> bool:
        """Report whether a stop was requested. Raises TrainingError where the run has been removed."""
        if self._gone.is_set():
            raise TrainingError(
                f"the run folder {self._storage.location} has been removed or renamed while the run was trained, and "
                "nothing more can be saved; move it back and repeat the command to resume"
            )
        return self._requested.is_set()

    def close(self) -> None:
        """End the thread soon; it is not waited for, because it may be waiting for an answer."""
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(self._storage.poll_seconds):
            try:
                if self._storage.read(STOP_FILE) is not None:
                    self._requested.set()
                    return
                if self._storage.is_gone():
                    self._gone.set()
                    return
            except StorageError:  # The next look may succeed.
                continue


def report_notes(attempt: Attempt, notes: Mapping[str, str]) -> None:
    """Write sentences about the start of a rank, by key, as soon as the storage answers; the driver shows each key once."""
    if notes:
        writer = StallWriter(attempt, echoes=False)  # It is not closed: it tries until this process ends.
        for key, sentence in notes.items():
            writer.write(StallReport(key, sentence))


class StallWriter:
    """Writes reports of stalls to the run's storage, from a thread: the storage may be what everything waits for."""

    def __init__(self, attempt: Attempt, *, echoes: bool) -> None:
        """Prepare to write. echoes: also print each report here."""
        self._attempt, self._echoes = attempt, echoes
        self._reports: SimpleQueue[StallReport | None] = SimpleQueue()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def write(self, report: StallReport) -> None:
        """Write a report soon; the driver shows it."""
        if self._echoes:
            print(report.line, file=person_stream(stderr=True), flush=True)
        if self._thread is None:  # Most runs never stall.
            self._thread = threading.Thread(target=self._run, name="stalls", daemon=True)
            self._thread.start()
        self._reports.put(report)

    def close(self) -> None:
        """End the thread soon; it is not waited for, because it may be waiting for an answer."""
        self._closed.set()
        self._reports.put(None)

    def _run(self) -> None:
        while (report := self._reports.get()) is not None:
            failed = False
            while not self._written(report, is_first=not failed):
                failed = True
                if self._closed.wait(STALL_RETRY_SECONDS):
                    break

    def _written(self, report: StallReport, *, is_first: bool) -> bool:
        try:
            storage = open_storage(self._attempt.folder)
            write_stall(storage, self._attempt.number, report.key, report.line, report.details)
        except StorageError as error:
            if is_first:  # The log of this process is the only other place.
                log.warning("%s (%s)", report.line, error)
            return False
        return True
