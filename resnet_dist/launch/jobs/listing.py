"""The jobs of this package on a cluster, with what their logs say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from resnet_dist.launch.jobs.client import asked, connect
from resnet_dist.launch.jobs.job import Job, find_job, ours
from resnet_dist.launch.jobs.progress import Progress, person_lines, read_progress

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


@dataclass(frozen=True)
class Cluster:
    """The jobs of a cluster. Every call may raise NoAnswer."""

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
        return [self._with_run(job) for job in ours(asked(self.client, self.client.list_jobs))]

    def find(self, name: str) -> tuple[Job, str]:
        """Return the job with this id, or the newest of this run, and a note where there are several.

        Raises UserError where there is none.
        """
        return find_job(self.jobs(), name, self.address)

    def log(self, job: Job) -> str:
        """Return the log of a job without the lines of Ray."""
        return person_lines(asked(self.client, lambda: self.client.get_job_logs(job.id)))

    def progress(self, job: Job) -> Progress:
        return read_progress(self.log(job))

    def _with_run(self, job: Job) -> Job:
        """Return the job with the name of its run, which the driver chose where `--resume` came without a name."""
        return job if job.run else replace(job, run=self.progress(job).run)
