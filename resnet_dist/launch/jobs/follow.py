"""Follow a job: print its log as it grows until it has ended, over lost connections and a head that restarts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from resnet_dist.errors import INTERRUPTED_EXIT_CODE, NO_ANSWER_EXIT_CODE
from resnet_dist.launch.jobs.advice import JobLeft
from resnet_dist.launch.jobs.client import ANSWER_SECONDS, cause_line, is_unknown_job
from resnet_dist.launch.jobs.ending import ending, exit_code, forgotten
from resnet_dist.launch.jobs.job import Job
from resnet_dist.launch.jobs.progress import may_have_dump, person_lines
from resnet_dist.system.limit import within
from resnet_dist.system.signals import handle_signals

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

POLL_SECONDS = 1.0
# After this long without an answer this command ends and leaves the job; a head restarts in less time.
LOST_SECONDS = 60.0
# A log that is silent for so long is a reason to ask for the job itself: a link that is cut sends no end.
SILENT_SECONDS = 15.0
PENDING_SECONDS = 30.0
MAX_UNKNOWN = 3  # times in a row that a head does not know a job before it has forgotten it
MAX_LOG_TRIES = 3  # at the end of a job, whose node may have gone with its log
Write = Callable[[str], None]


def follow(client: JobSubmissionClient, job: Job, write: Write, report: Write, *, stops: bool = False) -> int:
    """Print the log of a job until it has ended, and return its exit code.

    write: gets the log; report: lines of our own. stops: a first signal stops the job, and the rest of its log is
    still printed; without it, and for a second one, KeyboardInterrupt is raised. Raises JobLeft where the cluster
    has not answered for LOST_SECONDS.
    """
    follower = Follower(client, job, write, report)
    with handle_signals(follower.stop if stops else _interrupt):
        return follower.run()


class Follower:
    """One follower of a job. `run` returns the exit code of the job."""

    def __init__(self, client: JobSubmissionClient, job: Job, write: Write, report: Write) -> None:
        self._client, self._job, self._report = client, job, report
        self._address = client.get_address()
        self._log = JobLog(client, job.id, write, self._is_driver_lost)
        self._stopped = False
        self._num_unknown = self._num_log_tries = 0
        self._lost_since: float | None = None
        self._pending_since: float | None = time.monotonic()

    def stop(self, count: int) -> None:
        """Stop the job for the first signal; raise KeyboardInterrupt for the second. A handler for `handle_signals`."""
        if count > 1:
            raise KeyboardInterrupt
        self._report(f"stopping {self._job.title}: it saves a checkpoint first; Ctrl-C again leaves it")
        try:
            within(ANSWER_SECONDS, lambda: self._client.stop_job(self._job.id))
            self._stopped = True
        except Exception as error:  # Ray raises several types, see client.connect.
            self._report(
                f"{self._job.title} could not be stopped ({cause_line(error)}); Ctrl-C again leaves it"
            )

    def run(self) -> int:
        while True:
            try:
                # Read the state before the log: the log of a job that had ended by then is complete.
                if self._look() and self._has_rest():
                    return self._end()
                if not self._job.has_ended:
                    asyncio.run(self._log.tail(self._runs))
            except Exception as error:  # Ray raises several types, see client.connect.
                if is_unknown_job(error):
                    self._num_unknown += 1
                    if self._num_unknown >= MAX_UNKNOWN:
                        self._report(forgotten(self._job, self._address))
                        return 1
                self._leave_where_lost(error)
            time.sleep(POLL_SECONDS)

    def _look(self) -> bool:
        """Ask for the job; report whether it has ended."""
        details = within(ANSWER_SECONDS, lambda: self._client.get_job_info(self._job.id))
        self._job = self._job.renewed(details)
        self._num_unknown, self._lost_since = 0, None
        if self._job.state != "PENDING":
            self._pending_since = None
        elif self._pending_since is not None and time.monotonic() - self._pending_since > PENDING_SECONDS:
            self._pending_since = None
            self._report(
                f"{self._job.title} has not begun after {PENDING_SECONDS:g} s: the head still prepares its environment, or "
                "has no process for it"
            )
        return self._job.has_ended

    def _runs(self) -> bool:
        return not self._look()

    def _is_driver_lost(self) -> bool:
        if not self._job.has_ended:
            self._look()
        return self._job.is_driver_lost

    def _has_rest(self) -> bool:
        """Print the rest of the log of a job that has ended; report whether it is printed, or never will be."""
        try:
            self._log.print_rest()
        except Exception as error:  # The node that has it may have gone.
            self._num_log_tries += 1
            if self._num_log_tries < MAX_LOG_TRIES:
                return False
            self._report(f"{self._job.title}: the rest of its log cannot be read ({cause_line(error)})")
        return True

    def _end(self) -> int:
        if text := ending(self._job, self._log.tail_text, self._address, stopped_here=self._stopped):
            self._report(text)
        return exit_code(self._job)

    def _leave_where_lost(self, error: Exception) -> None:
        self._lost_since = self._lost_since or time.monotonic()
        if time.monotonic() - self._lost_since >= LOST_SECONDS:
            reason = f"no answer for {LOST_SECONDS:.0f} s ({cause_line(error)})"
            raise JobLeft(reason, self._job, self._address, exit_code=NO_ANSWER_EXIT_CODE) from None


class JobLog:
    """The log of a job, of which each character is printed once, however often the connection is lost."""

    def __init__(
        self, client: JobSubmissionClient, job: str, write: Write, is_driver_lost: Callable[[], bool]
    ) -> None:
        """is_driver_lost: whether Ray has ended the job by now; asked where a line of the log looks like its dump."""
        self._client, self._job, self._write = client, job, write
        self._is_driver_lost = is_driver_lost
        self._num_printed = 0  # characters
        self._ended_by_ray = False
        self.tail_text = ""  # the end of what was printed

    async def tail(self, runs: Callable[[], bool]) -> None:
        """Print the log until it ends, the connection is lost, or `runs()` is false after a silence.

        A new connection starts at the log's beginning.
        """
        position, chunks = 0, self._client.tail_job_logs(self._job)
        while (text := await _next(chunks, runs)) is not None:
            self._print(text, position)
            position += len(text)

    def print_rest(self) -> None:
        self._print(within(ANSWER_SECONDS, lambda: self._client.get_job_logs(self._job)), 0)

    def _print(self, text: str, position: int) -> None:
        fresh = text[max(0, self._num_printed - position) :]
        if not fresh:
            return
        # Ray marks the job as failed before it writes the dump. Where it does not answer, the text is read again.
        has_dump = not self._ended_by_ray and may_have_dump(fresh) and self._is_driver_lost()
        self._num_printed = position + len(text)
        if self._ended_by_ray:
            return
        self._ended_by_ray = has_dump
        if shown := person_lines(fresh, has_dump=has_dump):
            self._write(shown)
            self.tail_text = (self.tail_text + shown)[-20_000:]


async def _next(chunks: AsyncIterator[str], runs: Callable[[], bool]) -> str | None:
    """Return the next chunk; None at the end, and where there was silence and `runs()` is false."""
    task: asyncio.Future[Any] = asyncio.ensure_future(anext(chunks, None))  # type: ignore[arg-type]
    while not (await asyncio.wait({task}, timeout=SILENT_SECONDS))[0]:
        if not runs():
            task.cancel()
            return None
    return task.result()  # type: ignore[no-any-return]


def left_alone(job: Job, address: str) -> JobLeft:
    """Return the end of a command that was interrupted while it followed a job."""
    return JobLeft("interrupted", job, address, exit_code=INTERRUPTED_EXIT_CODE)


def _interrupt(count: int) -> None:
    raise KeyboardInterrupt
