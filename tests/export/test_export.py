"""An exported file gives what its source gives, on real images, in batches of any size; otherwise there is no file."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file

from resnet_dist.data.images.augment import normalize
from resnet_dist.export import formats, samples
from resnet_dist.export.run import ExportDiffers
from resnet_dist.model import averaged_logits
from resnet_dist.train.checkpoint.load import load_model
from tests.checkpoints import CLASSES, COLORED, random_checkpoint
from tests.data.images.pictures import jpeg, photo
from tests.predict.conftest import Command

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in formats.ONNX_PACKAGES), reason="the extra `onnx` is not installed"
)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(jpeg(photo(40 + 10 * number, 70, grain=3 + number)))
    return folder


@pytest.fixture(scope="session")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("resnet18")
    return str(random_checkpoint(folder, *COLORED, "model.name=resnet18", "data.image_size=64")[0])


def inputs_of(folder: Path, checkpoint: str) -> torch.Tensor:
    data = load_model(checkpoint, torch.device("cpu")).recipe.data
    pixels = np.random.default_rng(0).integers(0, 256, (3, data.image_size, data.image_size, 3), np.uint8)
    return torch.from_numpy(pixels)


@pytest.mark.parametrize(
    "name",
    [
        "m.safetensors",
        pytest.param("m.pt2", marks=pytest.mark.long),
        pytest.param("m.onnx", marks=[needs_onnx, pytest.mark.long]),
    ],
)
def test_a_file_agrees_with_its_source(
    command: Command, model: str, photos: Path, tmp_path: Path, name: str
) -> None:
    code, out, err = command("export", model, name, "--samples", "photos")
    assert code == 0, err
    assert out.startswith(f"{name}: largest difference of a logit ")
    assert "over 5 images; the first class differs for 0 (of --samples)" in out
    assert {path.name for path in tmp_path.iterdir()} == {"photos", name}
    assert command("export", model, name)[::2] == (
        2,
        f"error: OUT {name}: exists already; give another name, or remove it\n",
    )


def test_an_exported_file_predicts_as_its_source(command: Command, model: str, photos: Path) -> None:
    command("export", model, "m.safetensors", "--samples", "photos")
    rows = [command("predict", which, "photos", "--json")[1] for which in (model, "m.safetensors")]
    assert rows[0] == rows[1]
    assert rows[0].count("\n") == 5


@pytest.mark.parametrize("pixels", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_graph_takes_any_number_of_images(
    command: Command, model: str, photos: Path, tmp_path: Path, pixels: bool
) -> None:
    code, _, err = command("export", model, "m.pt2", "--samples", "photos", *(["--pixels"] if pixels else []))
    assert code == 0, err
    trained, images = load_model(model, torch.device("cpu")), inputs_of(photos, model)
    extra = {formats.DESCRIPTION: ""}
    graph = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    described = json.loads(extra[formats.DESCRIPTION])
    assert described["classes"] == list(CLASSES)
    assert described["input"].startswith("uint8" if pixels else "float32")
    given = images if pixels else normalize(images, trained.recipe.data).contiguous()
    with torch.no_grad():
        wanted = formats.source_of(trained)(images)
        for number in (1, 2, 3):
            torch.testing.assert_close(graph(given[:number]), wanted[:number], atol=1e-5, rtol=1e-4)


@needs_onnx
@pytest.mark.long
@pytest.mark.parametrize("pixels", [False, True])
def test_onnx_runs_without_torch(
    command: Command, model: str, photos: Path, tmp_path: Path, pixels: bool
) -> None:
    import onnx
    import onnxruntime

    code, _, err = command(
        "export", model, "m.onnx", "--samples", "photos", *(["--pixels"] if pixels else [])
    )
    assert code == 0, err
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    described = session.get_modelmeta().custom_metadata_map
    assert json.loads(described["classes"]) == list(CLASSES)
    (given,) = session.get_inputs()
    assert (given.type, given.shape[1:]) == (
        ("tensor(uint8)", [32, 32, 3]) if pixels else ("tensor(float)", [3, 32, 32])
    )
    for number in (1, 5):
        images = np.zeros((number, *given.shape[1:]), np.uint8 if pixels else np.float32)
        assert session.run(None, {"images": images})[0].shape == (number, len(CLASSES))


@pytest.mark.parametrize("end", [".pth", pytest.param(".safetensors", marks=pytest.mark.long)])
def test_torchvisions_own_class_loads_the_file(
    command: Command, resnet18: str, photos: Path, tmp_path: Path, end: str
) -> None:
    words = ("--format", "torchvision", "--samples", "photos")
    code, out, err = command("export", resnet18, f"m{end}", *words)
    assert code == 0, err
    assert "; the file has the net alone, without data.eval_flip and data.eval_shift, " in out
    trained = load_model(resnet18, torch.device("cpu"))
    opened = formats.FORMATS["torchvision"].open(trained, tmp_path / f"m{end}", False)
    given = inputs_of(photos, resnet18)
    assert torch.equal(opened(given), formats.plain_source_of(trained)(given))
    path = tmp_path / f"m{end}"
    net = torchvision.models.resnet18(num_classes=len(CLASSES)).eval()
    net.load_state_dict(load_file(path) if end == ".safetensors" else torch.load(path, weights_only=True))
    trained, images = load_model(resnet18, torch.device("cpu")), inputs_of(photos, resnet18)
    given = normalize(images, trained.recipe.data)
    with torch.no_grad():
        logits = averaged_logits(net, given, flip=True, shift=1)
        torch.testing.assert_close(logits, formats.source_of(trained)(images), atol=1e-4, rtol=1e-4)


def test_a_file_that_differs_is_not_kept(
    command: Command, model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(trained: object, path: Path, pixels: bool) -> formats.Run:
        run = written.open(trained, path, pixels)  # type: ignore[arg-type]
        return lambda images: run(images) + 0.01

    written = formats.FORMATS["safetensors"]
    monkeypatch.setitem(
        formats.FORMATS, "safetensors", formats.Format(written.suffixes, written.write, changed)
    )
    code, out, err = command("export", model, "m.safetensors", "--samples", "photos")
    assert (code, out) == (ExportDiffers.exit_code, "")
    assert err.startswith("error: m.safetensors: largest difference of a logit 0.01 over 5 images; ")
    assert err.endswith("--tolerance allows 0.0001; the file was not kept\n")
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}
    assert command("export", model, "m.safetensors", "--samples", "photos", "--tolerance", 0.02)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m.bin"], "OUT m.bin: its end names no format; use .safetensors, .onnx, .pt2, .pth, or --format"),
        (["m.bin", "--format", "pt2"], "OUT m.bin: a file of --format pt2 ends with .pt2"),
        (
            ["m.safetensors", "--pixels"],
            "--pixels changes a graph, and --format safetensors has none; use onnx or pt2",
        ),
        (["no/m.pt2"], "OUT no/m.pt2: no such folder"),
        (["m.pth"], "--format torchvision: torchvision has no resnet8; use another format"),
        (["m.pt2", "--samples", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_a_mistake_is_one_sentence(
    command: Command, model: str, tmp_path: Path, words: list[str], message: str
) -> None:
    code, out, err = command("export", model, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_images_that_cannot_be_compared_are_counted(command: Command, model: str, photos: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"<html>")
    (photos / "raw.nef").write_bytes(b"x")
    words = ("export", model, "m.safetensors", "--samples", "photos")
    code, out, err = command(*words)
    assert code == 3
    assert "over 5 images; the first class differs for 0; 1 more could not be decoded (of --samples)" in out
    assert "left out photos/bad.jpg: a bad image (not a readable image: an HTML page)\n" in err
    assert "left out raw.nef: a camera's raw file" in err
    assert err.endswith("exit code 3: 2 left out; --allow-left-out accepts this\n")
    (photos.parent / "m.safetensors").unlink()
    assert command(*words, "--allow-left-out")[0] == 0


def test_a_file_that_cannot_be_written_is_one_sentence(
    command: Command, model: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    written = formats.FORMATS["safetensors"]
    monkeypatch.setitem(formats.FORMATS, "safetensors", formats.Format(written.suffixes, full, written.open))
    code, out, err = command("export", model, "m.safetensors", "--samples", "photos")
    expected = "error: OUT m.safetensors: cannot be written: No space left on device\n"
    assert (code, out, err) == (1, "", expected)


def test_a_variant_that_torchvision_lacks(command: Command, photos: Path, tmp_path: Path) -> None:
    folder, _ = random_checkpoint(tmp_path / "se", *COLORED, "model.name=resnet18", "model.se=true")
    code, _, err = command("export", folder, "m.pth", "--samples", "photos")
    assert (code, err) == (
        2,
        "error: --format torchvision: torchvision has no resnet18 with model.se=True; use another format\n",
    )


def test_without_the_extra_onnx_is_refused(
    command: Command, model: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name != "onnx" else SimpleNamespace())
    code, _, err = command("export", model, "m.onnx", "--samples", "photos")
    assert (code, err) == (
        2,
        "error: --format onnx needs onnxscript and onnxruntime; pip install 'resnet-dist[onnx]'\n",
    )


def test_images_are_generated_where_the_held_out_set_is_elsewhere(
    command: Command, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "NUM_GENERATED", 2)
    code, out, err = command("export", model, "m.safetensors")
    assert code == 0, err
    assert "over 2 images" in out
    assert "generated, because " in out
