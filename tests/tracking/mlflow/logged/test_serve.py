"""The model that MLflow serves is the one that was evaluated, and takes images in every form."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image

from resnet_dist.data.images.augment import normalize
from resnet_dist.data.images.crop import to_sizes
from resnet_dist.data.images.decode import open_image
from resnet_dist.train.checkpoint.load import load_model
from resnet_dist.train.evaluate import logits_of
from tests.checkpoints import CLASSES, random_checkpoint
from tests.data.images.pictures import jpeg, photo, saved
from tests.tracking.mlflow.logged.conftest import write_logged

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:mlflow", "ignore::FutureWarning:mlflow")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PICTURES = {
    "a large JPEG": jpeg(photo(480, 700)),
    "a JPEG on its side": jpeg(photo(90, 131), exif=turned(6)),
    "a mirrored JPEG": jpeg(photo(64, 64), exif=turned(5)),
    "a grey JPEG": jpeg(photo(70, 50).convert("L")),
    "a CMYK JPEG": jpeg(photo(70, 50).convert("CMYK")),
    "a JPEG of that size": jpeg(photo(32, 32)),
    "a tiny PNG": saved(photo(7, 10), "PNG"),
    "a transparent PNG": saved(photo(40, 60).convert("RGBA").rotate(20), "PNG"),
    "a GIF": saved(photo(40, 60).convert("P"), "GIF"),
    "a WebP": saved(photo(61, 80), "WEBP"),
    "16 bits": saved(Image.fromarray(np.arange(0, 65000, 20, np.uint16).reshape(50, 65)), "PNG"),
}


@pytest.fixture(scope="module")
def served(logged: Path) -> Any:
    return mlflow.pyfunc.load_model(str(logged))


def test_it_sees_what_evaluation_sees_to_the_last_bit(served: Any, checkpoint: Path) -> None:
    trained = load_model(checkpoint, torch.device("cpu"))
    data, implementation = trained.recipe.data, served.unwrap_python_model()
    expected = np.stack(
        [
            to_sizes(open_image(picture, 3), data, [None], [False], 32)[0].copy()
            for picture in PICTURES.values()
        ]
    )
    views = implementation.views(list(PICTURES.values()))
    for name, view, one in zip(PICTURES, views, expected, strict=True):
        assert np.array_equal(view, one), name
    with torch.inference_mode():
        images = normalize(torch.from_numpy(expected), data)
        wanted = logits_of(trained.model, images, data).softmax(dim=1)
    assert torch.equal(implementation.probabilities(views), wanted)
    answers = served.predict(list(PICTURES.values()), params={"top_k": 2})
    best = wanted.topk(2, dim=1)
    assert answers["classes"].tolist() == [[CLASSES[label] for label in row] for row in best.indices.tolist()]
    assert answers["probabilities"].tolist() == best.values.tolist()


def test_every_form_of_an_image_gets_the_same_answer(served: Any) -> None:
    picture = saved(photo(40, 60), "PNG")
    pixels = np.array(Image.open(io.BytesIO(picture)))
    text = base64.b64encode(picture).decode()
    wrapped = base64.encodebytes(picture).decode()
    one: dict[str, Any] = {
        "bytes": picture,
        "bytearray": bytearray(picture),
        "base64": text,
        "base64 on lines": [wrapped],
        "a data URL": [f"data:image/png;base64,{text}"],
        "one array": pixels,
        "nested lists": pixels.tolist(),
        "integers": pixels.astype(np.int64)[None],
        "a column": {"image": picture},
        "pixels in a column": {"pixels": pixels[None]},
        "records": [{"image": text}],
        "a record of pixels": [{"pixels": pixels.tolist()}],
        "a series": pd.Series([picture]),
        "a table": pd.DataFrame({"image": [picture]}),
        "a table of one other column": pd.DataFrame({"content": [text]}),
        "a table with both columns": pd.DataFrame({"image": [None], "pixels": [pixels.tolist()]}),
    }
    expected = served.predict([picture]).to_dict("records")
    assert len(expected) == 1
    assert len(expected[0]["classes"]) == 5
    for name, given in one.items():
        assert served.predict(given).to_dict("records") == expected, name
    two = {
        "bytes": [picture] * 2,
        "arrays": np.stack([pixels] * 2),
        "lists": [pixels.tolist()] * 2,
        "both": [picture, pixels],
        "objects": np.array([picture, text], object),
    }
    batch = served.predict([picture, picture]).to_dict("records")
    for name, given in two.items():
        assert served.predict(given).to_dict("records") == batch, name
    assert len(served.predict([picture], params={"top_k": 99})["classes"][0]) == len(CLASSES)
    assert served.predict([]).to_dict("list") == {"classes": [], "probabilities": []}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([jpeg(photo(40, 40)), b"<html>"], "image 1: not a readable image: an HTML page"),
        (["no base64!"], "image 0: the text is not base64"),
        (np.zeros((2, 8, 8, 1), np.uint8), r"image 0: pixels of shape \(8, 8, 1\); they must be \(H, W, 3\)"),
        (np.zeros((8, 8, 3)), "pixels of float64 from 0.0 to 0.0; they must be integers from 0 to 255"),
        (np.full((8, 8, 3), 256), "from 256 to 256"),
        ([[[1, 2], [3]]], "image 0: "),
        ({"pixels": [[[["a", 1, 2]]]]}, "image 0: pixels that are no numbers; they must be integers from 0"),
        ({"photo": [b""]}, r"columns \['photo'\]; there must be"),
        (pd.DataFrame({"a": [1], "b": [2]}), r"columns \['a', 'b'\]"),
        ([{"image": b"x", "pixels": [1]}], "image 0: 2 of"),
        (7, "the input is a int"),
        ([b""], "image 0: not a readable image: an empty file"),
    ],
)
def test_a_bad_input_is_refused_with_its_number(served: Any, given: Any, message: str) -> None:
    with pytest.raises(MlflowException, match=message) as refused:
        served.predict(given)
    assert refused.value.get_http_status_code() == 400


def test_a_number_of_classes_that_is_none(served: Any) -> None:
    with pytest.raises(MlflowException, match="top_k is 0; it must be 1 or more"):
        served.predict([jpeg(photo(40, 40))], params={"top_k": 0})


def test_a_forward_pass_has_a_limit(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    implementation = served.unwrap_python_model()
    monkeypatch.setitem(type(implementation).predict.__globals__, "MAX_BATCH", 2)
    sizes, views = [], implementation.views

    def counted(images: list[Any], first: int) -> np.ndarray:
        sizes.append(len(images))
        return np.asarray(views(images, first))

    monkeypatch.setattr(implementation, "views", counted)
    assert len(served.predict([jpeg(photo(40, 40))] * 5)) == 5
    assert sizes == [2, 2, 1]


def test_models_of_two_versions_live_in_one_process(served: Any, tmp_path: Path) -> None:
    other, _ = random_checkpoint(tmp_path, "model.name=resnet14", seed=2)
    second = mlflow.pyfunc.load_model(str(write_logged(other, tmp_path / "model")))
    picture = jpeg(photo(40, 40))
    answers = [model.predict([picture])["probabilities"][0] for model in (served, second, served)]
    assert answers[0] == answers[2] != answers[1]
    packages = {type(model.unwrap_python_model().model).__module__ for model in (served, second)}
    assert len(packages) == 2


PROGRAM = """
import json, sys
sys.modules["resnet_dist"] = None  # A machine that serves a model does not have the package.
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
for name in sys.argv[2:]:
    print(json.dumps(model.predict([open(name, "rb").read()]).to_dict("records")))
print(json.dumps(model.predict(model.input_example).to_dict("records")))
"""


def test_it_loads_without_the_package_and_without_pickles(logged: Path, served: Any, tmp_path: Path) -> None:
    pictures = [tmp_path / "large.jpg", tmp_path / "turned.jpg"]
    for path, name in zip(pictures, ("a large JPEG", "a JPEG on its side"), strict=True):
        path.write_bytes(PICTURES[name])
    # By a copy at another place: nothing may be read from where it was written.
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(logged), *map(str, pictures)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    example = json.loads((logged / "input_example.json").read_text())
    for line, given in zip(lines, [*(path.read_bytes() for path in pictures), example], strict=True):
        assert line == served.predict(given).to_dict("records")
