"""The errors a person sees as one sentence, each with the exit code of the command that it ends.

Knows no torch. Every other exception is a defect of ours: the command line prints its traceback and exits with 1.
"""

from __future__ import annotations


class ExplainedError(Exception):
    """An error whose message says what a person needs: the command line prints it without a traceback."""

    exit_code = 1


class UserError(ExplainedError, ValueError):
    """A person's mistake, in one sentence: what is wrong, its value, and what would be accepted."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe, or an override of one of its fields, that cannot be run."""


class StorageError(ExplainedError, OSError):
    """A file that could not be read or fetched: names the URL and the cause."""


class TrainingError(ExplainedError, RuntimeError):
    """Training that cannot go on, in one sentence."""


class RankFailed(ExplainedError, RuntimeError):
    """A rank ended with an error: names the rank and quotes its message."""


class AlreadyReported(RankFailed):
    """Another rank failed first and has reported the cause: nothing more is printed."""
