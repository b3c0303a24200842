"""Every command that takes a MODEL and images: a mistake is one sentence with exit code 2, and leaves nothing behind."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
import yaml

from resnet_dist.tracking.mlflow.database.connect import connect
from tests.data.images.pictures import huge_png, jpeg, photo
from tests.predict.conftest import Command, command, model

__all__ = ["command", "model"]

PHOTO = jpeg(photo(80, 60))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an output folder whose store has a registered model of scikit-learn, and a run without a model."""
    folder = tmp_path_factory.mktemp("store") / "output"
    client = connect(f"sqlite:///{folder}/mlflow.db")
    experiment = client.create_experiment("tables", artifact_location=(folder / "artifacts/tables").as_uri())
    run_id = client.create_run(experiment, run_name="unfinished").info.run_id
    made = client.create_logged_model(experiment, "model")
    place = Path(made.artifact_location.removeprefix("file://"))
    place.mkdir(parents=True)
    flavors = {
        "sklearn": {"pickled_model": "model.pkl"},
        "python_function": {"loader_module": "mlflow.sklearn"},
    }
    (place / "MLmodel").write_text(yaml.safe_dump({"flavors": flavors, "model_id": made.model_id}))
    client.create_registered_model("tabular")
    version = client.create_model_version("tabular", made.artifact_location, run_id, model_id=made.model_id)
    client.set_registered_model_alias("tabular", "best", version.version)
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Return the working folder, with images and an empty folder."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jpg").write_bytes(PHOTO)
    (tmp_path / "text.jpg").write_bytes(b"hello\n")
    (tmp_path / "huge.png").write_bytes(huge_png())
    return tmp_path


COMMANDS = {
    "predict": ["a.jpg"],
    "explain": ["a.jpg"],
    "evaluate": ["SHARDS"],
    "export": ["new.safetensors"],
    "serve": ["--port", "0"],
}
MODELS = {
    "none": "'none' is neither a folder nor a run with a model (MLflow in ",
    "unfinished": "'unfinished' is neither a folder nor a run with a model (run unfinished has no model there",
    "0" * 32: "is neither a folder nor a run with a model (",
    "models:/none@best": "'models:/none@best' is no model of MLflow (",
    "models:/tabular@worst": "'models:/tabular@worst' is no model of MLflow (",
    "models:/tabular@best": "models:/tabular@best: a model of sklearn, which resnet_dist did not log and cannot read",
    "runs:/none/model": "'runs:/none/model' is no model of MLflow (",
    "empty": "empty: no model to load; ",
    "a.jpg": "a.jpg: no model to load; not a safetensors file",
    "none.safetensors": "'none.safetensors' is neither a folder nor a run with a model",
}


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_that_is_none(
    command: Command, here: Path, output: Path, digits_data: Path, name: str
) -> None:
    shutil.copytree(output, here / "output")
    words = [str(digits_data / "eval") if word == "SHARDS" else word for word in COMMANDS[name]]
    if name == "serve":
        with socket.create_server(("127.0.0.1", 0)) as free:
            words = ["--port", str(free.getsockname()[1])]
    before = sorted(path for path in here.iterdir())
    for given, message in MODELS.items():
        code, out, err = command(name, given, *words)
        assert (code, out, err.count("\n")) == (2, "", 1), (given, out, err)
        assert err.startswith("error: "), given
        assert message in err, given
    assert sorted(path for path in here.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["predict", "MODEL", "empty"], 2, "error: empty: no images in this folder"),
        (["explain", "MODEL", "empty"], 2, "error: empty: no images in this folder"),
        (
            ["export", "MODEL", "new.safetensors", "--samples", "empty"],
            2,
            "error: empty: no images in this folder",
        ),
        (["evaluate", "MODEL", "empty"], 2, "error: "),
        (["evaluate", "MODEL", "a.jpg"], 2, "error: "),
        (["predict", "MODEL", "text.jpg"], 3, "bad image text.jpg: not a readable image: a text file"),
        (["explain", "MODEL", "text.jpg"], 3, "left out text.jpg: a bad image"),
        (
            ["predict", "MODEL", "huge.png"],
            3,
            "10000 x 10000 pixels are more than 80,000,000; raise max_pixels",
        ),
        (
            ["explain", "MODEL", "huge.png"],
            3,
            "10000 x 10000 pixels are more than 80,000,000; raise max_pixels",
        ),
        (
            ["export", "MODEL", "new.safetensors", "--samples", "text.jpg"],
            2,
            "error: no image to compare the export with could be decoded",
        ),
        (["export", "MODEL", "new.txt"], 2, "error: OUT new.txt: its end names no format"),
        (["export", "MODEL", "a.jpg"], 2, "error: OUT a.jpg: its end names no format"),
        (["export", "MODEL", "none/new.onnx"], 2, "error: OUT none/new.onnx: no such folder"),
        (
            ["serve", "MODEL", "--host", "no.such.host.invalid"],
            2,
            "error: --host no.such.host.invalid: has no address",
        ),
        (
            ["serve", "MODEL", "--host", "192.0.2.1"],
            2,
            "error: --host 192.0.2.1: is no address of this machine",
        ),
        (["serve", "MODEL", "--top", "0"], 2, "--top"),
        (["serve", "MODEL", "--workers", "0"], 2, "--workers"),
        (
            ["evaluate", "MODEL", "SHARDS", "--register", "a/b"],
            2,
            "error: --register 'a/b': a name is no path",
        ),
        (
            ["export", "MODEL", "new.safetensors", "--register", "pets"],
            2,
            "is no model that MLflow has; name a run or models:/",
        ),
        (
            ["export", "MODEL", "new.pth", "--register", "pets@v1"],
            2,
            "error: --register 'pets@v1': MLflow keeps the alias",
        ),
        (["runs", "best", "--register", "@best"], 2, "error: --register '@best': the name is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_mistakes(
    command: Command, model: str, here: Path, digits_data: Path, words: list[str], code: int, message: str
) -> None:
    before = sorted(path for path in here.iterdir())
    known = {"MODEL": model, "SHARDS": str(digits_data / "eval")}
    found, out, err = command(*[known.get(word, word) for word in words])
    assert (found, out) == (code, ""), err
    assert message in err
    assert "Traceback" not in err
    assert sorted(path for path in here.iterdir()) == before


def test_a_port_in_use(command: Command, model: str, here: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = command("serve", model, "--port", port)
    assert (code, out) == (2, "")
    assert (
        err
        == f"error: --port {port}: cannot be used on 127.0.0.1 (Address already in use); use another one\n"
    )


def test_an_export_that_differs(
    command: Command, model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resnet_dist.export import run

    monkeypatch.setattr(
        run, "source_of", lambda trained: lambda images: trained.model(images.permute(0, 3, 1, 2).float())
    )
    code, out, err = command("export", model, "new.safetensors", "--samples", "a.jpg")
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("error: new.safetensors: largest difference of a logit ")
    assert "--tolerance allows 0.0001; the file was not kept" in err
    assert not (here / "new.safetensors").exists()
