"""A forked run names the other one in MLflow: by tags that can be searched, and by a link."""

from __future__ import annotations

from pathlib import Path

from resnet_dist.config import Recipe
from resnet_dist.runs.folder import RunFolder, read_run, stored_recipe
from resnet_dist.runs.lineage import Lineage
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow.run import MlflowRun
from resnet_dist.tracking.protocol import RunRecord


def test_a_fork_is_linked(output: Path, digits_recipe: Recipe) -> None:
    def opened(name: str, lineage: Lineage | None) -> MlflowRun:
        place = open_storage(output / "runs" / name)
        tags = {"mlflow.note.content": "Why."}
        run = RunFolder(
            place, name, None, 1, stored_recipe(digits_recipe), key=name, tags=tags, lineage=lineage
        )
        run.write()
        recorded = read_run(place)
        assert recorded is not None
        assert recorded.lineage == lineage
        return MlflowRun.open(RunRecord(recorded, digits_recipe, output))

    first = opened("a", None)
    fork = opened("b", Lineage("a", 4, "/o/runs/a", first.run_id))
    of_another_tracker = opened("c", Lineage("a", 4, "/o/runs/a", "unknown"))
    tags = fork.client.get_run(fork.run_id).data.tags
    assert (tags["resnet_dist.forked_from"], tags["resnet_dist.forked_from_id"]) == ("a@4", first.run_id)
    link = f"#/experiments/{first.experiment_id}/runs/{first.run_id}?workflowType=machine_learning"
    assert tags["mlflow.note.content"] == f"Forked from step 4 of [a]({link}).\n\nWhy."
    tags = fork.client.get_run(of_another_tracker.run_id).data.tags
    assert tags["mlflow.note.content"] == "Forked from step 4 of a.\n\nWhy."
    assert "resnet_dist.forked_from" not in fork.client.get_run(first.run_id).data.tags
