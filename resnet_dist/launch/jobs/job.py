"""A submitted job of this package, as its cluster describes it, and how it is found."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from resnet_dist.errors import UserError
from resnet_dist.system.redact import redact

# In the metadata of a job.
RUN, USER, RECIPE, SOURCE, OUTPUT, COMMAND = (
    f"resnet_dist.{name}" for name in ("run", "user", "recipe", "source", "output", "command")
)
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
MAX_NAMES = 3  # in a message
# The command of a job that an earlier version, or something else than `submit`, has submitted.
_OUR_COMMAND = re.compile(r"\bresnet[-_]dist\b|\bstart_job\.sh\b")


@dataclass(frozen=True)
class Job:
    """One submission. Texts are empty where they are not known."""

    id: str
    state: str  # in Ray's words: PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED
    run: str = ""
    user: str = ""
    recipe: str = ""
    source: str = ""  # the recipe file, as it was typed
    output: str = ""  # without secrets
    command: str = ""  # the `submit` command as it was typed, without secrets
    started: float | None = None  # seconds since 1970, by the clock of the cluster
    ended: float | None = None
    # The exit code of the process that ran `train`; negative: the signal that killed it.
    driver_exit_code: int | None = None
    error_type: str = ""  # Ray's name of what ended a job that failed
    message: str = ""  # Ray's text, of any number of lines

    @classmethod
    def of(cls, details: Any) -> Job:
        """Return the job that Ray's JobDetails describe."""
        metadata: Mapping[str, str] = details.metadata or {}
        command = details.entrypoint or ""
        return cls(
            details.submission_id,
            str(getattr(details.status, "value", details.status)),
            metadata.get(RUN) or _option(command, "--name"),
            metadata.get(USER, ""),
            metadata.get(RECIPE) or metadata.get("recipe", ""),
            metadata.get(SOURCE, ""),
            redact(metadata.get(OUTPUT) or _option(command, "--output")),
            metadata.get(COMMAND, ""),
            _seconds(details.start_time),
            _seconds(details.end_time),
            details.driver_exit_code,
            str(getattr(details.error_type, "value", details.error_type) or ""),
            details.message or "",
        )

    def renewed(self, details: Any) -> Job:
        """Return this job as Ray's JobDetails describe it now. Its run may be known from its log alone."""
        job = Job.of(details)
        return replace(job, run=job.run or self.run)

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def is_driver_lost(self) -> bool:
        """Report whether Ray ended this job because it had lost the driver, or had not started it."""
        return self.state == "FAILED" and self.driver_exit_code is None

    @property
    def name(self) -> str:
        """The name by which the other commands find this job: that of its run, or its own."""
        return self.run or self.id

    @property
    def title(self) -> str:
        """The job and its run, for messages."""
        return f"job {self.id} (run {self.run})" if self.run else f"job {self.id}"


def ours(found: Sequence[Any]) -> list[Job]:
    """Return the jobs of this package among Ray's JobDetails, the newest first."""
    jobs = [
        Job.of(details)
        for details in found
        if details.submission_id
        and (RUN in (details.metadata or {}) or _OUR_COMMAND.search(details.entrypoint or ""))
    ]
    return sorted(jobs, key=lambda job: job.started or 0.0, reverse=True)


def find_job(jobs: Sequence[Job], name: str, address: str) -> tuple[Job, str]:
    """Return the job with this id, or of the run with this name, and a note where there are several.

    A job that has not ended comes before one that has, then the newest. jobs: the newest first. Raises UserError
    where there is none.
    """
    found = [job for job in jobs if name in (job.id, job.run)]
    if not found:
        raise UserError(_no_job(jobs, name, address))
    # The newest may have failed at once, because an older one trains the run.
    chosen = next((job for job in found if not job.has_ended), found[0])
    others = [job for job in found if job is not chosen]
    if not others:
        return chosen, ""
    which = "the newest" if chosen is found[0] else "the one that runs"
    first, more = ", ".join(job.id for job in others[:MAX_NAMES]), len(others) - MAX_NAMES
    return chosen, (
        f"run {name} has {len(found)} jobs: this is {which}, {chosen.id}; the others: {first}"
        f"{f' and {more} more' if more > 0 else ''}"
    )


def _no_job(jobs: Sequence[Job], name: str, address: str) -> str:
    names = list(dict.fromkeys(known for job in jobs for known in (job.run, job.id) if known))
    near = difflib.get_close_matches(name, names, MAX_NAMES, cutoff=0.5)
    runs = [known for known in names if name and known.startswith(name)][:MAX_NAMES]
    advice = ", ".join(dict.fromkeys([*runs, *near][:MAX_NAMES]))
    if not names:
        return f"{name}: the cluster at {address} has no job of resnet-dist"
    return (
        f"{name}: the cluster at {address} has no job of this run or name; "
        f"{f'the nearest: {advice}; ' if advice else ''}resnet-dist jobs lists all {len(jobs)}"
    )


def _option(command: str, option: str) -> str:
    """Return the value of an option in the command of a job; empty where it has none."""
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return ""


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None
