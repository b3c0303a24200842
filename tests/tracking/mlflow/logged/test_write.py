"""The files of a logged model: what is in them, and nothing of the machine that wrote them."""

from __future__ import annotations

import json
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import yaml
from mlflow.models import Model

from resnet_dist.config import Recipe
from resnet_dist.data.images import __file__ as images_file
from resnet_dist.tracking.mlflow.logged import write
from tests.checkpoints import CLASSES

SECRET = "hunter2"


def test_no_file_names_this_machine(logged: Path, checkpoint: Path) -> None:
    # A test of this session may have loaded the model, and Python then compiled it.
    files = [path for path in logged.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    texts = {path: path.read_text() for path in files if path.suffix != ".safetensors"}
    assert {path.relative_to(logged).parts[0] for path in files} == {
        "MLmodel",
        "README.md",
        "artifacts",
        "conda.yaml",
        "input_example.json",
        "python_env.yaml",
        "requirements.txt",
        "serve.py",
        "serving_input_example.json",
    }
    own = (
        str(checkpoint.parent.parent),
        str(logged.parent),
        tempfile.gettempdir() + "/",
    )
    for path, text in texts.items():
        for name in own:
            assert name not in text, (path, name)
        assert path.suffix != ".pkl"


def test_requirements_are_releases_that_an_index_has(logged: Path) -> None:
    lines = (logged / "requirements.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in lines} == set(write.REQUIREMENTS)
    assert all(re.fullmatch(r"[a-z]+==[0-9.]+(rc\d+|\.post\d+)?", line) for line in lines)
    environment = yaml.safe_load((logged / "python_env.yaml").read_text())
    assert re.fullmatch(r"3\.\d+", environment["python"])


def test_the_signature_has_both_forms_and_the_example_fits(logged: Path) -> None:
    described = Model.load(str(logged))
    inputs = {column["name"]: column for column in described.signature.inputs.to_dict()}
    assert inputs["image"] == {"type": "binary", "name": "image", "required": False}
    assert inputs["pixels"]["items"]["items"]["items"] == {"type": "integer"}  # height, width, channels
    assert not inputs["pixels"]["required"]
    assert [column.name for column in described.signature.outputs] == ["classes", "probabilities"]
    assert [(param.name, param.default) for param in described.signature.params] == [("top_k", 5)]
    assert json.loads((logged / "serving_input_example.json").read_text()).keys() == {"inputs"}


def test_the_card_holds_what_a_person_asks(logged: Path) -> None:
    card = (logged / "README.md").read_text()
    for text in (
        "# digits: resnet8",
        "resnet_dist is not needed",
        "| eval/top1 | 0.9861 |",
        "…/",
        "/train`",
        "step 7",
        "87.5% of its short side",
        "top_k",
        version("resnet-dist"),
        "UV_TORCH_BACKEND=cpu",
        *CLASSES[:2],
    ):
        assert text in card, text
    assert "train/loss" not in card


def test_paths_and_passwords_stay_here(digits_recipe: Recipe) -> None:
    recipe = digits_recipe.with_overrides(
        [
            f"data.train=https://me:{SECRET}@host/set/train?Signature={SECRET}",
            "data.eval=/home/anna/sets/photos/eval",
            "model.init_from=/home/anna/weights.pth",
            "data.shard_cache=/home/anna/cache/shards",
            "data.source=none",
        ]
    )
    shared = recipe.portable()
    assert shared.data.train.startswith("https://")
    assert shared.data.eval == "…/photos/eval"
    assert shared.model.init_from == "…/anna/weights.pth"
    assert SECRET not in shared.to_json()
    assert "/home" not in shared.to_json()


def test_the_carried_modules_import_no_other_of_this_package() -> None:
    folder = Path(images_file).parent
    for name in write.CARRIED:
        text = (folder / f"{name}.py").read_text()
        assert not re.search(r"^\s*(from|import) resnet_dist", text, re.MULTILINE), name
        for dots, module in re.findall(r"^from (\.+)([\w.]+) import", text, re.MULTILINE):
            near = Path(name).parent if dots == "." else Path(name).parent.parent
            assert (near / module.replace(".", "/")).as_posix() in write.CARRIED, (name, module)
