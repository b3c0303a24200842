"""The lines that a person can type next: they name the run, on whatever machine they are typed."""

from __future__ import annotations

import shlex

from resnet_dist.launch.jobs.job import Job
from resnet_dist.system.command import CONTINUES, joined, named


class JobLeft(Exception):
    """This command ends but the job may still run: states why, and how to follow, see or stop the job."""

    def __init__(self, reason: str, job: Job, address: str, *, exit_code: int) -> None:
        super().__init__(
            f"{reason}; {job.title} is not stopped by this. To follow, see or stop it:\n{commands(job, address)}"
        )
        self.exit_code = exit_code


def commands(job: Job, address: str) -> str:
    """Return the three commands for a job that was left, a line each."""
    words = (("logs", job.name, "--follow"), ("status", job.name), ("stop", job.name))
    return "\n".join(f"  {command(*each, address=address)}" for each in words)


def command(*words: str, address: str) -> str:
    return joined(["resnet-dist", *words, "--address", address])


def continues(job: Job) -> str:
    """Return the lines with the command that continues the run of a job."""
    line = resume_line(job)
    if line:
        return f"{CONTINUES}\n  {line}"
    name = f" with --name {job.run}" if job.run else ""
    return f"submitting the recipe again{name} continues it"


def resume_line(job: Job) -> str:
    """Return the command that continues the run of a job; empty where it is not known."""
    return joined(named(shlex.split(job.command), job.run)) if job.command and job.run else ""
