"""Artifacts that nobody would find are reported, not written; results that are not sent are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resnet_dist.config import Recipe
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.page import PROFILE_FOLDER
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow import results
from resnet_dist.tracking.mlflow.results import OutOfReach, log_recipe, results_of
from resnet_dist.tracking.protocol import RunRecord


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_folder_of_the_servers_machine(
    is_shared: bool, tmp_path: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client writes to the path that the server names, on whatever machine it runs."""
    folder = tmp_path / "srv/mlflow/1/run/artifacts"

    def log_text(text: str, name: str) -> None:
        folder.mkdir(parents=True)
        (folder / name).write_text(text)

    def answer(*arguments: object, **options: object) -> Any:
        files = [{"path": "recipe.json"}] if is_shared else []
        return SimpleNamespace(json=lambda: {"files": files} if files else {})

    info = SimpleNamespace(artifact_uri=str(folder))
    client = SimpleNamespace(get_run=lambda run_id: SimpleNamespace(info=info))
    run = SimpleNamespace(uri="http://mlflow:5000", run_id="run", client=client, log_text=log_text)
    monkeypatch.setattr(results, "http_request_safe", answer)
    if is_shared:
        log_recipe(run, digits_recipe)  # type: ignore[arg-type]
        assert (folder / "recipe.json").exists()
    else:
        with pytest.raises(OutOfReach, match=f"lie in {folder} on the server's machine"):
            log_recipe(run, digits_recipe)  # type: ignore[arg-type]
        assert not (tmp_path / "srv").exists()


def test_the_results_that_a_tracker_away_did_not_get_are_named(tmp_path: Path, digits_recipe: Recipe) -> None:
    run = RunFolder(open_storage(tmp_path), "x", None, 1, {})
    record = RunRecord(run, digits_recipe, tmp_path)
    assert results_of(record) == ["the model"]
    run.storage.write(f"{PROFILE_FOLDER}/steps-1-2.json.gz", b"")
    assert results_of(record) == ["the profile", "the model"]
