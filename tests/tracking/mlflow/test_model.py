"""A model of MLflow is found under any name, and its download does not outlive the command."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from resnet_dist.tracking.mlflow import model
from resnet_dist.tracking.mlflow.logged.lookup import Logged, find_logged


def test_a_download_goes_with_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Callable[[], Any]] = []
    given: list[str | None] = []

    def download(location: str, dst_path: str | None, tracking_uri: str) -> str:
        given.append(dst_path)
        (tmp_path / "artifacts/checkpoint").mkdir(parents=True, exist_ok=True)
        (tmp_path / "artifacts/checkpoint/checkpoint.json").touch()
        return str(tmp_path)

    def register(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        at_exit.append(functools.partial(call, *arguments, **options))

    monkeypatch.setattr(atexit, "register", register)
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    for location in ("s3://bucket/model", "mlflow-artifacts:/1/model", f"file://{tmp_path}", str(tmp_path)):
        monkeypatch.setattr(model, "find_logged", lambda client, name, location=location: Logged(location))
        model.download_model("models:/pets@best", f"sqlite:///{tmp_path}/mlflow.db")
    remote = [Path(folder) for folder in given if folder is not None]
    assert [folder is None for folder in given] == [False, False, True, True]
    assert all(folder.is_dir() for folder in remote)
    for call in at_exit:
        call()
    assert not any(folder.exists() for folder in remote)


def test_a_quote_in_the_name_of_a_model() -> None:
    asked: list[str] = []

    def search(query: str) -> list[Any]:
        asked.append(query)
        return [SimpleNamespace(version="2"), SimpleNamespace(version="10")]

    client: Any = SimpleNamespace(
        search_model_versions=search,
        get_model_version=lambda name, version: SimpleNamespace(
            name=name, version=version, model_id="", run_id=""
        ),
        get_model_version_download_uri=lambda name, version: f"s3://{name}/{version}",
    )
    assert find_logged(client, "models:/cat's/latest") == Logged("s3://cat's/10")
    assert asked == ['name = "cat\'s"']
