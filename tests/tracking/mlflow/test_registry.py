"""A model is registered once, and only where it loads; whatever fails leaves the registry as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException

from resnet_dist.config import Recipe
from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RunFolder, read_run
from resnet_dist.tracking.locate import run_id_of
from resnet_dist.tracking.mlflow import registry, results
from resnet_dist.tracking.mlflow.database.connect import connect
from resnet_dist.tracking.mlflow.logged.lookup import Logged, find_logged
from resnet_dist.tracking.mlflow.registry import Candidate, DoesNotLoad, check_it_loads, register_logged
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.registration import Registration
from resnet_dist.tracking.store import TrackerAway, tracking_uri
from resnet_dist.tracking.sync import sync_runs

BEST = Registration("pets", "best")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every model load; return the places of those that were asked."""
    asked: list[str] = []
    monkeypatch.setattr(registry, "check_it_loads", lambda location, uri: asked.append(location))
    return asked


class Store:
    """The store of an output folder, with runs that have logged models without files."""

    def __init__(self, output: Path) -> None:
        self.output, self.uri = output, tracking_uri(output)
        self.client = connect(self.uri)
        self.experiment = self.client.create_experiment("digits", artifact_location=output.as_uri())

    def run(self, name: str, *, has_model: bool = True) -> Logged | None:
        run = self.client.create_run(self.experiment, run_name=name).info.run_id
        if not has_model:
            return None
        model = self.client.create_logged_model(self.experiment, "model", source_run_id=run)
        self.client.log_outputs(run, [LoggedModelOutput(model.model_id, step=1)])
        return find_logged(self.client, name)

    def register(self, logged: Logged, registration: Registration = BEST) -> str:
        return register_logged(self.client, self.uri, logged, registration)

    def versions(self) -> list[tuple[str, str]]:
        return sorted((one.name, str(one.version)) for one in self.client.search_model_versions())


@pytest.fixture
def store(output: Path) -> Store:
    return Store(output)


def test_repeating_it_changes_nothing_and_an_alias_moves(store: Store, loads: list[str]) -> None:
    first, second = store.run("first"), store.run("second")
    assert first is not None
    assert second is not None
    assert [store.register(first) for _ in range(2)] == ["pets version 1 (@best)"] * 2
    assert loads == [first.location]  # Nothing was left to do.
    assert store.register(second) == "pets version 2 (@best)"
    assert store.register(first, Registration("pets")) == "pets version 1"
    assert store.register(second, Registration("pets", "champion")) == "pets version 2 (@champion)"
    assert store.versions() == [("pets", "1"), ("pets", "2")]
    for name in ("models:/pets@best", "models:/pets/2", "models:/pets@champion", "models:/pets/latest"):
        assert find_logged(store.client, name) == second
    tags = store.client.get_logged_model(second.model_id).tags
    assert json.loads(tags[registry.VERSIONS_TAG]) == [{"name": "pets", "version": 2}]


def test_a_model_that_does_not_load_is_not_registered(store: Store, tmp_path: Path) -> None:
    logged = store.run("first")
    assert logged is not None
    with pytest.raises(
        DoesNotLoad,
        match="the model does not load in a process of its own: .*No such artifact.*was not registered",
    ):
        store.register(logged)
    assert store.client.search_registered_models() == []


def test_what_fails_leaves_no_name_without_a_version(
    store: Store, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = store.run("first")
    assert logged is not None

    def fails(*arguments: object, **options: object) -> None:
        raise MlflowException("no")

    with monkeypatch.context() as away:
        away.setattr(mlflow.MlflowClient, "create_model_version", fails)
        with pytest.raises(MlflowException):
            store.register(logged)
    assert store.client.search_registered_models() == []
    assert store.register(logged) == "pets version 1 (@best)"


def test_a_candidate_is_found_before_the_work(store: Store, loads: list[str], tmp_path: Path) -> None:
    store.run("first")
    store.run("training", has_model=False)
    (tmp_path / "model.safetensors").touch()
    candidate = Candidate.find("first", store.output, BEST)
    candidate.check_step(1)
    with pytest.raises(
        UserError, match="--register pets@best: MLflow has the model of step 1, and this one is of step 9"
    ):
        candidate.check_step(9)
    assert candidate.register() == "pets version 1 (@best)"
    for model, problem in (
        (
            str(tmp_path / "model.safetensors"),
            "is no model that MLflow has; name a run or models:/NAME@ALIAS",
        ),
        ("none", "has no run of that name"),
        ("training", "run training has no model there; a run has one when it has finished"),
        ("models:/pets@worst", "worst"),
        ("models:/none/1", "none"),
        ("0" * 32, "0000"),
    ):
        with pytest.raises(UserError) as refused:
            Candidate.find(model, store.output, BEST)
        assert str(refused.value).startswith(f"--register pets@best: MODEL {model}"), refused.value
        assert problem in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_run_of_this_output_is_not_another_one_of_its_name(store: Store, trained: RunFolder) -> None:
    store.run("x")
    assert run_id_of("x", store.output) is None  # The tracker has not got the one of this output yet.
    assert sync_runs(store.output, "x", lambda line: None)
    mine = run_id_of("x", store.output)
    store.run("x")
    assert mine == run_id_of("x", store.output)
    assert find_logged(store.client, str(mine)) != find_logged(store.client, "x")
    assert run_id_of("models:/pets@best", store.output) is None


def test_a_tracker_that_is_away_is_no_mistake(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*arguments: object, **options: object) -> None:
        raise ConnectionError("Connection refused")

    monkeypatch.setattr(registry, "find_logged", away)
    with pytest.raises(TrackerAway, match="connection refused"):
        Candidate.find("first", output, BEST)


def test_a_server_takes_a_model_by_its_id() -> None:
    """It refuses a place on its own disk that another machine names."""
    created: list[tuple[Any, ...]] = []
    client: Any = SimpleNamespace(
        create_model_version=lambda *given, **more: created.append((*given, more["model_id"]))
    )
    registry._create_version(client, "http://mlflow:5000", "pets", Logged("/srv/1/m-1", "m-1", "r"))
    registry._create_version(
        client, "http://mlflow:5000", "pets", Logged("mlflow-artifacts:/1/r/model", None, "r")
    )
    assert created == [
        ("pets", "models:/m-1", "r", "m-1"),
        ("pets", "mlflow-artifacts:/1/r/model", "r", None),
    ]


def test_sync_registers_what_a_tracker_did_not_get(
    output: Path, trained: RunFolder, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(trained, register="pets@best").write()
    lines: list[str] = []
    with monkeypatch.context() as broken:

        def fails(location: str, uri: str) -> None:
            raise DoesNotLoad("the model does not load")

        broken.setattr(registry, "check_it_loads", fails)
        assert not sync_runs(output, "x", lines.append)
    stored = read_run(trained.storage)
    assert stored is not None
    assert stored.unsent == ("the registration as pets@best",)
    assert any("did not get the registration as pets@best: the model does not load" in line for line in lines)
    assert connect(tracking_uri(output)).search_registered_models() == []
    assert sync_runs(output, None, lines.append)
    assert "registered as pets version 1 (@best)" in lines
    assert sync_runs(output, "x", lines.append)
    assert len(loads) == 1
    found = find_logged(connect(tracking_uri(output)), "models:/pets@best")
    assert found == find_logged(connect(tracking_uri(output)), "x")
    # It is kept where the folder was moved.
    shutil.copytree(output, output.with_name("moved"))
    shutil.rmtree(output)
    moved = Candidate.find("models:/pets@best", output.with_name("moved"), BEST)
    assert moved.logged.location.startswith(output.with_name("moved").as_uri())
    assert (Path(moved.logged.location.removeprefix("file://")) / "MLmodel").exists()


def test_a_model_that_does_not_load_costs_no_figures(digits_recipe: Recipe, trained: RunFolder) -> None:
    run: Any = SimpleNamespace(place="MLflow", uri="sqlite:///x")
    done: list[str] = []

    def task(name: str, error: Exception | None = None) -> tuple[str, Callable[[], object]]:
        def do() -> None:
            if error is not None:
                raise error
            done.append(name)

        return name, do

    lines: list[str] = []
    tasks = [task("the model"), task("the registration", DoesNotLoad("why")), task("the figures")]
    assert results._do(tasks, run, lines.append) == ["the registration"]
    assert done == ["the model", "the figures"]
    assert lines == ["MLflow did not get the registration: why"]
    tasks = [task("the model", OSError("away")), task("the registration"), task("the figures")]
    run.client = None
    assert results._do(tasks, run, lines.append) == ["the model", "the registration", "the figures"]
    record = RunRecord(replace(trained, register="pets"), digits_recipe, Path())
    assert results.results_of(record) == ["the model", "the registration as pets"]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning:mlflow", "ignore::FutureWarning:mlflow")
def test_a_process_of_its_own_loads_the_model(output: Path, trained: RunFolder) -> None:
    replace(trained, register="pets@best").write()
    lines: list[str] = []
    assert sync_runs(output, "x", lines.append), lines
    assert "registered as pets version 1 (@best)" in lines
    uri = tracking_uri(output)
    logged = find_logged(connect(uri), "models:/pets@best")
    folder = Path(logged.location.removeprefix("file://"))
    weights = folder / "artifacts/checkpoint/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DoesNotLoad, match="in a process of its own: .*(safetensors|Safetensor)"):
        check_it_loads(logged.location, uri)
    with pytest.raises(DoesNotLoad):
        register_logged(connect(uri), uri, logged, Registration("pets", "other"))
    assert "other" not in connect(uri).get_registered_model("pets").aliases
