"""The jobs of this package on a cluster, with what their logs say, or the storage of their runs where a log is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Self

from resnet_dist.launch.jobs.client import NoAnswer, asked, connect, last_lines
from resnet_dist.launch.jobs.job import Job, find_job, ours
from resnet_dist.launch.jobs.progress import Progress, person_lines, read_progress
from resnet_dist.runs.folder import RUNS_FOLDER, read_run
from resnet_dist.runs.storage.open import is_url, open_storage
from resnet_dist.system.limit import within
from resnet_dist.system.redact import HIDDEN
from resnet_dist.tracking.spool import last_step

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

TAIL_LINES = 1000
NUM_READERS = 8  # of logs, at the same time
# For the logs of all jobs that have ended, or that name a run: nodes that are gone may have had them, and answer no more.
LOGS_SECONDS = 30.0
STORAGE_SECONDS = 10.0  # for the journal of a run whose log is gone


@dataclass(frozen=True)
class Cluster:
    """The jobs of a cluster. Every call may raise NoAnswer, except `progress`."""

    client: JobSubmissionClient

    @classmethod
    def at(cls, address: str) -> Self:
        """Connect to the dashboard at `address`. Raises UserError."""
        return cls(connect(address))

    @property
    def address(self) -> str:
        return self.client.get_address()  # type: ignore[no-any-return]

    def jobs(self) -> list[Job]:
        """Return the jobs of this package, the newest first."""
        return self._with_runs(self._listed())

    def find(self, name: str) -> tuple[Job, str]:
        """Return the job with this id, or of this run, and a note where there are several: see find_job.

        Raises UserError where there is none.
        """
        jobs = self._listed()
        if not any(name == job.id or (name == job.run and not job.has_ended) for job in jobs):
            # A job that continues the run may be named by its log alone.
            jobs = self._with_runs(jobs)
        job, note = find_job(jobs, name, self.address)
        return self._with_run(job), note

    def log(self, job: Job) -> str:
        """Return the log of a job without the lines of Ray."""
        text = asked(self.client, lambda: self.client.get_job_logs(job.id))
        return person_lines(text, has_dump=job.is_driver_lost)

    def looks(self, jobs: Sequence[Job], *, whole: bool) -> list[Progress | None]:
        """Return what is known of each of these jobs, which are the newest first; None of one that has not begun.

        whole: the whole logs of jobs that run, not their ends alone. A job that has ended is not known where all of them
        take longer than LOGS_SECONDS.
        """
        newest = {job.id for job in {job.run: job for job in reversed(jobs)}.values()}
        ended = [job for job in jobs if job.has_ended]
        found = {job.id: Progress(is_known=False) for job in ended}

        def look(job: Job) -> None:
            progress = self.progress(job) if whole and not job.has_ended else self.glance(job)
            # An older job of a run ended with another step than the run has now.
            found[job.id] = self.of_storage(job) if not progress.is_known and job.id in newest else progress

        _in_threads(look, ended)
        for job in jobs:
            if job.state == "RUNNING":
                look(job)
        return [found.get(job.id) for job in jobs]

    def of_storage(self, job: Job) -> Progress:
        """Return the step that the journal of a job's run has, as far as this machine sees the storage of the run."""
        unknown = Progress(is_known=False)
        # A path that does not begin at the root is one in the folder of the job, and here another one. With code 2 the job
        # has trained nothing: the run may be another job's.
        is_whole = is_url(job.output) or job.output.startswith(("/", "file:///"))
        if not job.run or not is_whole or HIDDEN in job.output or job.driver_exit_code == 2:
            return unknown

        def read() -> int | None:
            run = read_run(open_storage(job.output).at(RUNS_FOLDER).at(job.run))
            return None if run is None else last_step(run.spool)

        try:
            return replace(unknown, run=job.run, step=within(STORAGE_SECONDS, read))
        except Exception:  # A store that refuses this person, or does not answer, may raise anything.
            return unknown

    def glance(self, job: Job) -> Progress:
        """Return what the last lines of a job's log say; of a long run, a whole log is megabytes.

        A restart further back is not known then. The whole log is read where the lines have no step, as at a start.
        """
        try:
            progress = read_progress(asked(self.client, lambda: last_lines(self.client, job.id, TAIL_LINES)))
        except NoAnswer:  # The head may be of an older Ray, and the log on a node that has gone.
            return self.progress(job)
        return self.progress(job) if progress.step is None else progress

    def progress(self, job: Job) -> Progress:
        """Return what the log of a job says. Where it cannot be read, as where its node has gone, nothing is known."""
        try:
            return read_progress(self.log(job))
        except NoAnswer:
            return Progress(is_known=False)

    def _listed(self) -> list[Job]:
        """Return the jobs of this package as the cluster describes them, the newest first."""
        return ours(asked(self.client, self.client.list_jobs))

    def _with_runs(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs as `_with_run` does, those whose logs do not come in LOGS_SECONDS as they are."""
        found = {job.id: job for job in jobs}

        def look(job: Job) -> None:
            found[job.id] = self._with_run(job)

        _in_threads(look, [job for job in jobs if not job.run])
        return [found[job.id] for job in jobs]

    def _with_run(self, job: Job) -> Job:
        """Return the job with the name of its run, which the driver chose where `--resume` came without a name."""
        return job if job.run else replace(job, run=self.progress(job).run)


def _in_threads(look: Callable[[Job], None], jobs: Sequence[Job]) -> None:
    """Call a function for each job, of several at the same time; return after LOGS_SECONDS at the latest."""
    left: SimpleQueue[Job] = SimpleQueue()
    for job in jobs:
        left.put(job)

    def work() -> None:
        while True:
            try:
                look(left.get_nowait())
            except Empty:
                return

    # Daemon threads: a node that does not answer must not keep the process alive.
    threads = [threading.Thread(target=work, name="logs", daemon=True) for _ in jobs[:NUM_READERS]]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + LOGS_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
