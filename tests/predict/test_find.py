"""MODEL may be a folder, a run by its name or id, or a model that MLflow has; anything else is one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from resnet_dist.errors import UserError
from resnet_dist.predict.find import find_model
from resnet_dist.runs.folder import RunFolder, stored_recipe
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow.database.connect import connect
from resnet_dist.tracking.mlflow.model import log_model
from resnet_dist.tracking.mlflow.run import MlflowRun
from resnet_dist.tracking.store import URI_VARIABLE
from resnet_dist.train.checkpoint.load import load_model
from tests.checkpoints import COLORED, random_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:mlflow", "ignore::FutureWarning:mlflow")


@pytest.fixture(autouse=True)
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URI_VARIABLE, raising=False)


def run_in(output: Path, name: str) -> RunFolder:
    place = open_storage(output / "runs" / name)
    _, recipe = random_checkpoint(output / "runs" / name / "checkpoints", *COLORED)
    made = RunFolder(place, name, None, 1, stored_recipe(recipe), key=name)
    made.write()
    return made


def test_models_of_mlflow_and_runs_by_name_and_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one test, because MLflow takes seconds to create its store."""
    output = tmp_path / "output"
    made = run_in(output, "first")
    checkpoint, recipe = random_checkpoint(tmp_path / "other", *COLORED)
    uri = f"sqlite:///{output}/mlflow.db"
    client = connect(uri)
    experiment = client.create_experiment("photos", artifact_location=(output / "artifacts").as_uri())
    run = client.create_run(experiment, run_name="it's logged")
    opened = MlflowRun(client, uri, output, experiment, run.info.run_id)
    model_uri = log_model(opened, checkpoint, recipe, 7, {"eval/top1": (0.5, 1)})
    client.create_registered_model("pets")
    model_id = model_uri.removeprefix("models:/")
    with monkeypatch.context() as environment:
        environment.setenv(URI_VARIABLE, uri)  # To register, MLflow looks there.
        version = client.create_model_version("pets", model_uri, run.info.run_id, model_id=model_id)
    client.set_registered_model_alias("pets", "best", version.version)
    for name in (
        "first",
        str(output / "runs/first"),
        str(checkpoint),
        "it's logged",
        run.info.run_id,
        model_uri,
        "models:/pets@best",
        "models:/pets/1",
        "models:/pets/latest",
        "runs:/" + run.info.run_id + "/model",
    ):
        found = find_model(name, str(output))
        assert load_model(found, torch.device("cpu")).step == 7, name
    assert str(find_model("first", str(output))) == f"{made.checkpoints.location}/step-00000007"
    for name, words in (
        (
            "firts",
            r"'firts' is neither a folder nor a run with a model \(MLflow .* no run of that name\); did you mean first\?",
        ),
        ("models:/pets@worst", r"'models:/pets@worst' is no model of MLflow \(.*worst.* not found"),
        ("models:/none/1", r"'models:/none/1' is no model of MLflow \(.*none"),
        ("0" * 32, r"neither a folder nor a run with a model \(.*0000"),
    ):
        with pytest.raises(UserError, match=words):
            find_model(name, str(output))
    foreign = Path(client.get_logged_model(model_id).artifact_location.removeprefix("file://"))
    shutil.rmtree(foreign / "artifacts")
    with pytest.raises(
        UserError, match=r"models:/pets@best: .*which resnet_dist did not log and cannot read"
    ):
        find_model("models:/pets@best", str(output))


def test_without_a_store_nothing_is_created(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"'nothing' is neither .*, and there is no MLflow store at .*mlflow.db; use"
    ):
        find_model("nothing", str(tmp_path / "output"))
    assert not (tmp_path / "output").exists()


def test_a_run_is_found_beside_a_folder_of_images_that_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that holds a model itself is what a person names."""
    run_in(tmp_path / "output", "pets")
    (tmp_path / "pets/cat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(find_model("pets", "output")).startswith(f"{tmp_path}/output/runs/pets/checkpoints/step-")
    random_checkpoint(tmp_path / "pets/checkpoints", *COLORED)
    assert find_model("pets", "output") == Path("pets")
