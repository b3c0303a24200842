"""The jobs of this package on a cluster, with what their logs say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from resnet_dist.launch.jobs.client import NoAnswer, asked, connect, last_lines
from resnet_dist.launch.jobs.job import Job, find_job, ours
from resnet_dist.launch.jobs.progress import Progress, person_lines, read_progress

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

TAIL_LINES = 1000


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
        return [self._with_run(job) for job in self._listed()]

    def find(self, name: str) -> tuple[Job, str]:
        """Return the job with this id, or of this run, and a note where there are several: see find_job.

        Raises UserError where there is none.
        """
        jobs = self._listed()
        if not any(name == job.id or (name == job.run and not job.has_ended) for job in jobs):
            # A job that continues the run may be named by its log alone.
            jobs = [self._with_run(job) for job in jobs]
        job, note = find_job(jobs, name, self.address)
        return self._with_run(job), note

    def log(self, job: Job) -> str:
        """Return the log of a job without the lines of Ray."""
        text = asked(self.client, lambda: self.client.get_job_logs(job.id))
        return person_lines(text, has_dump=job.is_driver_lost)

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

    def _with_run(self, job: Job) -> Job:
        """Return the job with the name of its run, which the driver chose where `--resume` came without a name."""
        return job if job.run else replace(job, run=self.progress(job).run)
