"""The errors that a person sees as one sentence, each with the exit code of the command that it ends.

Knows no torch. Every other exception is a defect of ours: the command line prints its traceback and exits
with 1.

Three more exceptions carry an `exit_code`: driver.request.Interrupted, study.run.StudyInterrupted and
launch.jobs.advice.JobLeft. They are no ExplainedErrors: the command that catches them prints a line of its own.
"""

from __future__ import annotations

UNSENT_EXIT_CODE = 4  # The training is finished, but MLflow did not get everything.
# A cluster, or a tracker whose runs are asked for, does not answer; 5 is that of `status` for a job that has not ended.
NO_ANSWER_EXIT_CODE = 6
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells report it; used for SIGTERM too


class ExplainedError(Exception):
    """An error whose message is all that a person needs: the command line prints it without a traceback."""

    exit_code = 1


class UserError(ExplainedError, ValueError):
    """A person's mistake, in one sentence: what is wrong, its value, and what would be accepted."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe, or an override of one of its fields, that cannot be run."""


class StorageError(ExplainedError, OSError):
    """A file that could not be read or fetched: names the URL and the cause."""


class TrainingError(ExplainedError, RuntimeError):
    """Training that cannot continue: names the cause in one sentence."""


class Diverged(TrainingError):
    """Training that would fail again if it were continued: only another recipe, under another name, helps."""


class TooManyBadSamples(ExplainedError, RuntimeError):
    """A result that is refused because too many samples of its set could not be used: names the first."""


class RankFailed(ExplainedError, RuntimeError):
    """A rank ended with an error: names the rank and quotes its message.

    details: everything that is known of it, for a file; often hundreds of lines.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class RanksLost(RankFailed):
    """Ranks whose process, node or network went away, through no fault of the recipe or of this package.

    The driver starts the ranks again. preempted: the node was taken away by its owner, after a notice. begun: the code
    of the ranks ran, so that what they compute may be the cause.
    """

    def __init__(
        self, message: str, details: str = "", *, preempted: bool = False, begun: bool = True
    ) -> None:
        super().__init__(message, details)
        self.preempted, self.begun = preempted, begun


class Superseded(StorageError):
    """A driver or a rank whose run belongs to another one now, or whose driver is gone: it must write no more."""


class AlreadyReported(RankFailed):
    """Another rank failed first and has reported the cause: nothing more is printed."""


def exit_code_of(error: BaseException | None) -> int:
    """Return the exit code of a command that `error` ends: its `exit_code`, or 1 where it has none."""
    # KeyboardInterrupt is Python's own class, so it has no `exit_code`.
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED_EXIT_CODE
    return int(getattr(error, "exit_code", 1))
