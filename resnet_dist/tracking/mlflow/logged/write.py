"""Write a model in MLflow's format so that it loads without pickles, and where this package is not installed."""

from __future__ import annotations

import io
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array
from packaging.version import Version

import resnet_dist.data.images
import resnet_dist.model
from resnet_dist.config import Recipe
from resnet_dist.tracking.mlflow.logged.card import card
from resnet_dist.train.checkpoint.folder import copy_model

SERVE_FILE, CARD_FILE = "serve.py", "README.md"
CHECKPOINT, CODE = "checkpoint", "code"  # the names of the artifacts, which serve.py repeats
TOP_K = 5  # the default of `top_k`, which serve.py repeats
# Without explicit requirements MLflow spends 14 s guessing them. serve.py and the code beside it import these.
REQUIREMENTS = ("torch", "numpy", "pandas", "pillow", "simplejpeg", "safetensors", "mlflow")
# The modules of resnet_dist/data/images from the bytes of a file to the input of the network.
CARRIED = (
    *("__init__", "decode", "formats", "metadata", "opened", "pillow_decode", "view"),
    *("jpeg/__init__", "jpeg/crops", "jpeg/header", "jpeg/region", "jpeg/scales", "jpeg/seekable"),
)


def write_model(
    folder: Path, checkpoint: Path, recipe: Recipe, described: Model, metrics: Mapping[str, float]
) -> None:
    """Write the model of a checkpoint folder to `folder`; metrics: those of its step, for the card."""
    recipe = recipe.portable()
    with tempfile.TemporaryDirectory() as parts, warnings.catch_warnings(), _without_git():
        warnings.simplefilter("ignore")  # MLflow's advice on type hints, for agents
        weights, code = Path(parts) / CHECKPOINT, Path(parts) / CODE
        manifest = copy_model(checkpoint, weights, recipe.model_dump(mode="json"))
        _copy_code(code)
        mlflow.pyfunc.save_model(
            path=folder,
            mlflow_model=described,
            python_model=str(Path(__file__).with_name(SERVE_FILE)),
            artifacts={CHECKPOINT: str(weights), CODE: str(code)},
            pip_requirements=requirements(),
            signature=_signature(),
            input_example=_example(recipe.data.evaluation_size, recipe.data.channels),
            model_config={"device": "auto"},
        )
    _finish(folder, described)
    text = card(recipe, tuple(manifest["classes"]), manifest["scalars"]["step"], metrics, requirements())
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def requirements() -> list[str]:
    """Return the packages that the model needs, in versions that an index has: torch 2.9.1, not the build 2.9.1+cu130.

    The release of torch is what answers depend on; its build is the host's choice, since one list serves both. The
    ordinary build of Linux runs on hosts with and without a GPU.
    """
    return [f"{name}=={Version(version(name)).public}" for name in REQUIREMENTS]


def _copy_code(folder: Path) -> None:
    """Copy the network and the way from a file to its input, as packages `network` and `images`."""
    network, images = (
        Path(package.__file__ or "").parent for package in (resnet_dist.model, resnet_dist.data.images)
    )
    shutil.copytree(network, folder / "network", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "images/jpeg").mkdir(parents=True)
    for name in CARRIED:
        shutil.copy(images / f"{name}.py", folder / "images" / f"{name}.py")


def _signature() -> ModelSignature:
    """Return the signature: a row is an image, either its encoded bytes or its pixels."""
    pixels = Array(Array(Array(DataType.integer)))  # height, width, channels
    signature = ModelSignature(
        Schema(
            [ColSpec(DataType.binary, "image", required=False), ColSpec(pixels, "pixels", required=False)]
        ),
        Schema(
            [ColSpec(Array(DataType.string), "classes"), ColSpec(Array(DataType.double), "probabilities")]
        ),
        ParamSchema([ParamSpec("top_k", DataType.long, TOP_K)]),
    )
    # The model takes bytes and arrays as they are, not in a table alone, and checks them itself: MLflow would refuse
    # arrays, and take seconds for each image of nested lists.
    signature._is_signature_from_type_hint = True
    return signature


def _example(size: int, channels: int) -> list[dict[str, bytes]]:
    """Return an input: a picture of a gradient, since no image of the data set may leave it unasked."""
    from PIL import Image

    ramp = np.linspace(0, 255, size, dtype=np.uint8)
    plane = np.broadcast_to(ramp, (size, size))
    pixels = plane if channels == 1 else np.stack([plane, plane.T, plane[::-1, ::-1]], axis=2)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return [{"image": file.getvalue()}]


def _finish(folder: Path, described: Model) -> None:
    """Replace what MLflow wrote of this machine: paths, the patch release of Python, compiled code."""
    flavor = described.flavors["python_function"]
    flavor["model_code_path"] = SERVE_FILE
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    described.save(str(folder / "MLmodel"))
    # Any patch release of Python serves; uv or pyenv would have to download the one of this machine.
    for name, found, wanted in (
        ("python_env.yaml", r"^python: (\d+\.\d+)\.\S+$", r'python: "\1"'),  # quoted, or it would be a number
        ("conda.yaml", r"^- python=(\d+\.\d+)\.\S+$", r"- python=\1"),
    ):
        path = folder / name
        path.write_text(re.sub(found, wanted, path.read_text(), flags=re.MULTILINE))
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache, ignore_errors=True)


@contextmanager
def _without_git() -> Iterator[None]:
    """Keep MLflow from running git, which it waits for as long as that takes. The run has its commit already."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "git"}
    for name in before:
        del sys.modules[name]
    sys.modules["git"] = None  # type: ignore[assignment]  # An import now raises ImportError.
    try:
        yield
    finally:
        del sys.modules["git"]
        sys.modules.update(before)
