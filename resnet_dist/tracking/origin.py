"""Tags that say where a run comes from, under the names that MLflow's page reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from resnet_dist.config import Recipe
from resnet_dist.config.description import markdown
from resnet_dist.system.provenance import (
    CHANGES_VARIABLE,
    GIT_BRANCH_VARIABLE,
    GIT_COMMIT_VARIABLE,
    SOURCE_VARIABLE,
    USER_VARIABLE,
    GitState,
    git_state,
    user_name,
)
from resnet_dist.system.redact import redact

NOTE_TAG = "mlflow.note.content"  # the description, which the page renders as Markdown
COMMIT_TAG, BRANCH_TAG = "mlflow.source.git.commit", "mlflow.source.git.branch"
DIRTY_TAG, CHANGES_TAG, NOT_DEFAULT_TAG, JOB_TAG, ERROR_TAG, STOPPED_TAG = (
    f"resnet_dist.{name}"
    for name in ("git_dirty", "changes_from_file", "not_default", "ray_job", "error", "stopped")
)
ENDS = (ERROR_TAG, STOPPED_TAG)  # of an attempt; the next one begins without them
# Why the changes to the code of a commit are not on the page.
NO_DIFF_TAG = "resnet_dist.git_diff"
# The tags of rank 0's machine.
MACHINE_PREFIX = "resnet_dist.machine."
# Those that an attempt may have and the next one may lack.
_OF_ATTEMPT = (
    *(COMMIT_TAG, BRANCH_TAG, DIRTY_TAG, NO_DIFF_TAG, CHANGES_TAG, NOT_DEFAULT_TAG, JOB_TAG),
    *ENDS,
)
NOT_SUBMITTED = "a submitted job has none"
MAX_ERROR = 1000  # characters
# Ray sets it for the driver of a job.
_RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def origin_tags(source: str, description: str) -> dict[str, str]:
    """Return the tags of user, source, commit and description, as MLflow's fluent functions set them."""
    return tags_of_origin(source, description, git_of(source))


def tags_of_origin(source: str, description: str, git: GitState | None) -> dict[str, str]:
    """Return what `origin_tags` returns, for a state of the repository that is known."""
    return {
        "mlflow.user": os.environ.get(USER_VARIABLE) or user_name(),
        "mlflow.source.name": os.environ.get(SOURCE_VARIABLE) or source,
        "mlflow.source.type": "LOCAL",
        NOTE_TAG: redact(markdown(description)),
        **_git_tags(git),
        **_job_tags(),
    }


def is_of_attempt(tag: str) -> bool:
    """Report whether a tag describes one attempt: where a later attempt has no such tag, it does not hold any more."""
    return tag in _OF_ATTEMPT or tag.startswith(MACHINE_PREFIX)


def git_of(source: str) -> GitState | None:
    """Return the state of the repository of a recipe file, or of the one that `submit` has seen; None outside one."""
    if commit := os.environ.get(GIT_COMMIT_VARIABLE):
        return GitState(commit, os.environ.get(GIT_BRANCH_VARIABLE, ""), no_diff=NOT_SUBMITTED)
    return git_state(Path(source).parent)


def recipe_tags(recipe: Recipe, changes: str) -> dict[str, str]:
    """Return the tags of what a command changed of the recipe's file, and of what the recipe sets.

    In a submitted job, `submit` has read the file.
    """
    changes = os.environ.get(CHANGES_VARIABLE) or changes
    fields = {name: value for name, value in recipe.not_default().items() if name != "description"}
    tags = {CHANGES_TAG: redact(changes), NOT_DEFAULT_TAG: redact(_listed(fields))}
    return {name: text for name, text in tags.items() if text}


def changes_text(recipe: Recipe, file_recipe: Recipe) -> str:
    """Return what a recipe changes of its file, such as "optim.lr=0.2 (was 0.1)", without passwords."""
    changes = recipe.changes_from(file_recipe)
    return redact(_listed({name: f"{value} (was {was})" for name, (value, was) in changes.items()}))


def _listed(fields: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())


def _git_tags(git: GitState | None) -> dict[str, str]:
    if git is None:
        return {}
    dirty = "unknown" if git.commit.endswith("-unchecked") else str(git.is_dirty).lower()
    branch = {BRANCH_TAG: redact(git.branch)} if git.branch else {}
    no_diff = {NO_DIFF_TAG: git.no_diff} if git.no_diff and dirty != "false" else {}
    return {COMMIT_TAG: git.commit, DIRTY_TAG: dirty, **branch, **no_diff}


def _job_tags() -> dict[str, str]:
    """Return the tag with the submission id of the Ray job that this process is the driver of."""
    try:
        config = json.loads(os.environ.get(_RAY_JOB_VARIABLE, "{}"))
        return {JOB_TAG: str(config["metadata"]["job_submission_id"])}
    except (ValueError, KeyError, TypeError):
        return {}
