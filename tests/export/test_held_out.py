"""Whole programs: every image of a held-out set through an exported file, and integers with their accuracy."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from resnet_dist.config import Recipe
from resnet_dist.export import quantize
from resnet_dist.export.formats import ONNX_PACKAGES
from resnet_dist.train.loop import train
from resnet_dist.world import World
from tests.checkpoints import random_checkpoint
from tests.predict.conftest import Command
from tests.train.runs import Recorder

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ONNX_PACKAGES), reason="the extra `onnx` is not installed"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits_data: Path) -> str:
    """Return a run that has learned the digits."""
    from resnet_dist.config import load_recipe
    from tests.paths import ROOT

    overrides = [
        f"data.train={digits_data}/train",
        f"data.eval={digits_data}/eval",
        "model.name=resnet8",
        "train.length=4 epochs",
        "train.figures=none",
    ]
    recipe: Recipe = load_recipe(ROOT / "jobs/digits.py", overrides)
    folder = tmp_path_factory.mktemp("run")
    train(recipe, folder, World.single(), Recorder())
    return str(folder)


@pytest.mark.long
@pytest.mark.parametrize("name", ["m.pt2", pytest.param("m.onnx", marks=needs_onnx), "m.pth"])
def test_a_file_agrees_on_the_whole_held_out_set(
    command: Command, trained: str, digits_data: Path, tmp_path: Path, name: str
) -> None:
    source = trained
    if name == "m.pth":  # torchvision's nets take three channels
        overrides = (
            "model.name=resnet18",
            "data.channels=3",
            "data.mean=[0.3,0.3,0.3]",
            "data.std=[0.4,0.4,0.4]",
        )
        colored = (*overrides, "data.image_size=32", f"data.eval={digits_data}/eval")
        source = str(random_checkpoint(tmp_path / "m", *colored, classes=tuple("0123456789"))[0])
    code, out, err = command("export", source, name)
    assert (code, err) == (0, "")
    found = re.search(r"largest difference of a logit (\S+) over 360 images; .* differs for 0 ", out)
    assert found is not None, out
    assert float(found[1]) <= 1e-4


@needs_onnx
@pytest.mark.long
@pytest.mark.parametrize("pixels", [False, True])
def test_integers_are_as_good(command: Command, trained: str, tmp_path: Path, pixels: bool) -> None:
    import onnx
    import onnxruntime

    code, out, err = command("export", trained, "q.onnx", "--quantize", "int8", *(["--pixels"] * pixels))
    assert (code, err) == (0, "")
    found = re.search(r"top-1 (\S+)% before, (\S+)% as int8, over 360 images of .*; (\S+) → (\S+) MB", out)
    assert found is not None, out
    before, after, size, small = map(float, found.groups())
    assert before >= 95
    assert before - after <= 1
    assert small < 0.6 * size
    kinds = {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    described = onnxruntime.InferenceSession(str(tmp_path / "q.onnx")).get_modelmeta().custom_metadata_map
    assert json.loads(described["quantized"]) == "int8"
    assert json.loads(described["classes"]) == list("0123456789")
    assert {path.name for path in tmp_path.iterdir()} == {"q.onnx"}


@needs_onnx
@pytest.mark.long
def test_integers_that_are_worse_are_not_kept(
    command: Command, trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "_accuracies", lambda *arguments: (0.9, 0.85, 20, 360))
    code, out, err = command("export", trained, "q.onnx", "--quantize", "int8", "--max-drop", 0.04)
    assert (code, out) == (1, "")
    assert err.startswith("error: q.onnx: top-1 90.00% before, 85.00% as int8, over 360 images of ")
    assert err.endswith("--max-drop allows 0.04; the file was not kept\n")
    assert not list(tmp_path.iterdir())


@needs_onnx
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m.pt2"], "--quantize int8 writes an ONNX file; give OUT the end .onnx"),
        (["m.onnx"], "--quantize int8 measures accuracy on labelled images, and "),
        (["m.onnx", "--samples", "a", "--samples", "b"], "--quantize int8 measures accuracy on one set"),
        (["m.onnx", "--samples", "nowhere"], "nowhere/index.json: no such index"),
    ],
)
def test_a_mistake_is_one_sentence(
    command: Command, model: str, tmp_path: Path, words: list[str], message: str
) -> None:
    code, out, err = command("export", model, *words, "--quantize", "int8")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
