"""The end of a job: its exit code, and a sentence where its own log does not have one."""

from __future__ import annotations

import signal
from contextlib import suppress

from resnet_dist.errors import INTERRUPTED_EXIT_CODE, UNSENT_EXIT_CODE
from resnet_dist.launch.jobs import advice
from resnet_dist.launch.jobs.job import Job
from resnet_dist.launch.jobs.progress import read_progress

RUNNING_EXIT_CODE = 5  # what `status` ends with where the job has not ended
FIRST_SIGNAL_CODE = 128  # A shell adds this to the number of the signal that killed a program.
MAX_REASON = 300  # characters of Ray's message that are shown
RANKS_END = "its ranks end by themselves"
_CAUSES = {
    "JOB_SUPERVISOR_ACTOR_DIED": "Ray lost the process that runs the driver of {run}, or its node",
    "RUNTIME_ENV_SETUP_FAILURE": "Ray could not prepare the environment of the driver of {run}",
    "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE": "Ray found no node for the driver of {run}",
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT": "Ray could not start the driver of {run} in time",
    "JOB_SUPERVISOR_ACTOR_START_FAILURE": "Ray could not start the driver of {run}",
}
# The driver did not begin, so that no rank did.
_NOT_BEGUN = tuple(name for name in _CAUSES if name != "JOB_SUPERVISOR_ACTOR_DIED")


def exit_code(job: Job) -> int:
    """Return the exit code of a job that has ended, as `submit` and `logs --follow` end with it."""
    if job.state == "SUCCEEDED":
        return 0
    if job.state == "STOPPED":
        return INTERRUPTED_EXIT_CODE
    code = job.driver_exit_code
    if code == INTERRUPTED_EXIT_CODE:
        return code
    return 1 if not code or killed_by(job) is not None else code


def status_code(job: Job) -> int:
    """Return the exit code of `status`: 0 finished, 1 failed, 4 and 130 as elsewhere, RUNNING_EXIT_CODE before the end."""
    if not job.has_ended:
        return RUNNING_EXIT_CODE
    code = exit_code(job)
    # The others, such as 2 of a mistake in the recipe, would be mistaken for an end of `status` itself.
    return code if code in (0, UNSENT_EXIT_CODE, INTERRUPTED_EXIT_CODE) else 1


def killed_by(job: Job) -> int | None:
    """Return the signal that killed the driver; None where it ended by itself."""
    code = job.driver_exit_code or 0
    if code == INTERRUPTED_EXIT_CODE:
        return None
    if code < 0:
        return -code
    return code - FIRST_SIGNAL_CODE if FIRST_SIGNAL_CODE < code < 2 * FIRST_SIGNAL_CODE else None


def ending(job: Job, log: str, address: str, *, stopped_here: bool = False) -> str:
    """Return the lines about the end of a job which its log does not have; empty where it has all."""
    if job.state == "SUCCEEDED":
        return ""
    has_line = read_progress(log).continues
    if job.state == "STOPPED":
        if stopped_here and has_line:
            return ""
        who = "" if stopped_here else " by another command, or in Ray's dashboard"
        sentence = f"{job.title} was stopped{who}"
        return sentence if has_line else f"{sentence}; {advice.continues(job)}"
    cause = _cause(job)
    if not cause:
        return ""  # The driver has reported what ended it.
    return (
        f"{cause}; {advice.continues(job)}\nits log:\n  {advice.command('logs', job.name, address=address)}"
    )


def forgotten(job: Job, address: str) -> str:
    """Return the lines about a job that its cluster does not know any more."""
    return (
        f"the cluster at {address} does not know {job.title} any more: its head was restarted, and has forgotten its jobs; "
        f"the driver went with it, and {RANKS_END}; {advice.continues(job)}"
    )


def _cause(job: Job) -> str:
    """Return why the driver could not report its end; empty where it could."""
    number = killed_by(job)
    run = f"run {job.run}" if job.run else "its run"
    if number is not None:
        memory = ", as the kernel does where memory runs out" if number == signal.SIGKILL else ""
        return f"job {job.id}: the driver of {run} was killed ({_signal_name(number)}{memory}); {RANKS_END}"
    if job.driver_exit_code:
        return ""
    cause = _CAUSES.get(job.error_type, "Ray ended the driver of {run}").format(run=run)
    rest = "nothing was trained" if job.error_type in _NOT_BEGUN else RANKS_END
    return f"job {job.id}: {cause} ({_reason(job)}); {rest}"


def _reason(job: Job) -> str:
    lines = [line.strip() for line in job.message.splitlines() if line.strip()]
    text = lines[0] if lines else job.error_type or "it names no reason"
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}…"


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
