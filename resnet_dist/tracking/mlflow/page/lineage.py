"""The lineage of a forked run in MLflow: tags that can be searched, and a link in its description."""

from __future__ import annotations

from contextlib import suppress

import mlflow

from resnet_dist.runs.lineage import Lineage
from resnet_dist.tracking.mlflow.browse.links import run_link
from resnet_dist.tracking.origin import NOTE_TAG

FORK_TAG, FORK_ID_TAG = "resnet_dist.forked_from", "resnet_dist.forked_from_id"


def lineage_tags(client: mlflow.MlflowClient, lineage: Lineage | None, note: str) -> dict[str, str]:
    """Return the tags of a fork, with the description `note` and a link to the other run; none for another run."""
    if lineage is None:
        return {}
    name = lineage.run
    if lineage.run_id is not None:
        with suppress(Exception):  # Another tracker has that run, or none any more: its name remains.
            experiment = client.get_run(lineage.run_id).info.experiment_id
            name = f"[{lineage.run}]({run_link('', experiment, lineage.run_id).lstrip('/')})"
    line = f"Forked from step {lineage.step} of {name}."
    found = {FORK_TAG: f"{lineage.run}@{lineage.step}", FORK_ID_TAG: lineage.run_id or ""}
    # The page shows the first lines of a description, and the rest on request.
    return {**found, NOTE_TAG: f"{line}\n\n{note}".strip()}
