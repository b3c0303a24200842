"""Stop a job: its driver asks the ranks for a checkpoint, and Ray ends them where that takes too long."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from resnet_dist.launch.jobs.advice import JobLeft, continues
from resnet_dist.launch.jobs.client import NoAnswer, asked
from resnet_dist.launch.jobs.job import Job
from resnet_dist.launch.jobs.progress import Progress
from resnet_dist.launch.jobs.submission import STOP_SECONDS
from resnet_dist.runs.folder import CHECKPOINTS_FOLDER, RUNS_FOLDER, checkpoint_name

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

POLL_SECONDS = 0.5
MAX_SECONDS = 2.0 * STOP_SECONDS  # A variable of the job may give it longer than STOP_SECONDS.


def stop_job(client: JobSubmissionClient, job: Job, report: Callable[[str], None]) -> Job:
    """Stop a job, wait for its end, and return it as it is then. A job that has ended is returned as it is.

    Raises NoAnswer, and JobLeft where it has not ended in MAX_SECONDS.
    """
    if job.has_ended:
        return job
    name = job.id
    asked(client, lambda: client.stop_job(name))
    report(f"stopping {job.title}: it saves a checkpoint first, for up to {STOP_SECONDS} s")
    deadline = time.monotonic() + MAX_SECONDS
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        try:
            job = job.renewed(asked(client, lambda: client.get_job_info(name)))
        except NoAnswer:
            continue
        if job.has_ended:
            return job
    raise JobLeft(
        f"it has not ended {MAX_SECONDS:g} s after the request to stop",
        job,
        client.get_address(),
        exit_code=1,
    )


def describe_stop(job: Job, progress: Progress) -> str:
    """Return what a stopped job saved and where, and the command that continues its run."""
    if not progress.is_known:
        return f"{job.title} is stopped; its log cannot be read, so what it has saved is not known; {continues(job)}"
    if progress.saved_step is not None:
        place = f"{job.output}/{RUNS_FOLDER}/{job.run}/{CHECKPOINTS_FOLDER}/{checkpoint_name(progress.saved_step)}"
        return f"{job.title} is stopped, and saved step {progress.saved_step} in {place}; {continues(job)}"
    if progress.step is None:
        return f"{job.title} is stopped before its first step; {continues(job)}"
    return (
        f"{job.title} is stopped after step {progress.step}, but has not saved it: its newest checkpoint before that counts; "
        f"{continues(job)}"
    )
