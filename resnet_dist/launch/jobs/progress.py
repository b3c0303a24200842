"""Read the log of a job: the lines are those of the driver, in cli/training/, terminal.py and driver/."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from resnet_dist.runs.folder import CHECKPOINT_PREFIX
from resnet_dist.system.command import CONTINUES

# Lines of Ray before the command of a job begins.
_RAY_LINE = re.compile(
    r"^(?:\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\tINFO \S+\.py:\d+ -- .*|Running entrypoint for job \S+: .*)\n",
    re.MULTILINE,
)
# Where Ray ends a job, it appends what it knows to the log: dozens of lines, which the message of the job has too.
_RAY_DUMP = re.compile(
    r"^(?:Job supervisor actor died|Job supervisor actor could not be scheduled|runtime_env setup failed|"
    r"Unexpected error occurred): .*",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Progress:
    """The state of a run as its log has it; None and empty texts where it does not say."""

    # False: the log could not be read, and the step, if there is one, is that of the run's journal.
    is_known: bool = True
    run: str = ""
    step: int | None = None
    total_steps: int | None = None
    attempt: int | None = None  # the attempt of the ranks, after a restart
    mlflow: str = ""  # the page of the run
    checkpoint: str = ""  # where a finished run has its last one: a path on the cluster, or a URL
    saved_step: int | None = None  # the step that an interrupted run has saved
    error: str = ""  # the last one
    continues: bool = False  # whether the log ends with the line that continues the run


def read_progress(log: str) -> Progress:
    """Return what a log says; the last line about something counts."""
    progress = Progress(continues=CONTINUES in "\n".join(log.splitlines()[-20:]))
    for line in log.splitlines():
        for pattern, change in _PATTERNS:
            if (found := pattern.match(line)) is not None:
                progress = change(progress, found)
                break
    return progress


def person_lines(log: str, *, has_dump: bool) -> str:
    """Return the lines of a log that are for the person: without those of Ray, before and after the command.

    has_dump: whether Ray ended the job. Where it did not, a line like those of its dump is the driver's own.
    """
    text = _RAY_LINE.sub("", log)
    return _RAY_DUMP.sub("", text) if has_dump else text


def may_have_dump(log: str) -> bool:
    """Report whether this part of a log has a line with which Ray's dump would begin."""
    return _RAY_DUMP.search(log) is not None


def _later(progress: Progress, step: str | None) -> int | None:
    """Return the later one of the step so far and one that a line may have."""
    return progress.step if step is None else max(progress.step or 0, int(step))


_Change = Callable[[Progress, "re.Match[str]"], Progress]
_PATTERNS: tuple[tuple[re.Pattern[str], _Change], ...] = (
    (
        re.compile(r"step (\d+)/(\d+)  "),
        # An evaluation beside training is one of an earlier step; a resumed run states its own.
        lambda progress, found: replace(progress, step=_later(progress, found[1]), total_steps=int(found[2])),
    ),
    (
        re.compile(r"run (\S+): (\d+) steps, "),
        lambda progress, found: replace(progress, run=found[1], total_steps=int(found[2])),
    ),
    (
        re.compile(r"resumed at step (\d+) of (\d+)"),
        lambda progress, found: replace(progress, step=int(found[1]), total_steps=int(found[2])),
    ),
    (
        re.compile(r".*; attempt (\d+) resumes from "),
        lambda progress, found: replace(progress, attempt=int(found[1])),
    ),
    (re.compile(r"MLflow: (https?://\S+)$"), lambda progress, found: replace(progress, mlflow=found[1])),
    (
        # The last lines of a finished run: a resumed one may have no other line with a step.
        re.compile(rf"checkpoint (\S.*?(?:/{CHECKPOINT_PREFIX}(\d+))?)$"),
        lambda progress, found: replace(progress, checkpoint=found[1], step=_later(progress, found[2])),
    ),
    (
        re.compile(r"interrupted(?: at step (\d+))?; "),
        lambda progress, found: replace(
            progress, saved_step=int(found[1]) if found[1] else None, step=_later(progress, found[1])
        ),
    ),
    (re.compile(r"error: (.*)"), lambda progress, found: replace(progress, error=found[1])),
)
