"""Tags that say where a run comes from, under the names that MLflow's page reads."""

from __future__ import annotations

import os
from pathlib import Path

from resnet_dist.system.provenance import (
    GIT_COMMIT_VARIABLE,
    SOURCE_VARIABLE,
    USER_VARIABLE,
    git_commit,
    user_name,
)
from resnet_dist.system.redact import redact
from resnet_dist.tracking.description import markdown


def origin_tags(source: str, description: str) -> dict[str, str]:
    """Return the tags of user, source, commit and description, as MLflow's fluent functions set them."""
    return {
        "mlflow.user": os.environ.get(USER_VARIABLE) or user_name(),
        "mlflow.source.name": os.environ.get(SOURCE_VARIABLE) or source,
        "mlflow.source.type": "LOCAL",
        "mlflow.note.content": redact(markdown(description)),
        **_git_tags(Path(source).parent),
    }


def _git_tags(folder: Path) -> dict[str, str]:
    commit = os.environ.get(GIT_COMMIT_VARIABLE) or git_commit(folder)
    return {"mlflow.source.git.commit": commit} if commit else {}
