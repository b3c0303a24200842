"""The code that MLflow runs to serve a logged model: encoded images or pixels in, class names and probabilities out.

It is stored with the model and must not import resnet_dist: it repeats a few file names and formulas, and imports the
copies of resnet_dist/model and of some modules of resnet_dist/data/images that are stored beside the weights.
"""

import base64
import binascii
import hashlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file

TOP_K = 5
IMAGE, PIXELS = "image", "pixels"  # the columns of the signature
COLUMNS = {IMAGE, PIXELS}
MAX_BATCH = 256  # images of a forward pass; repeats resnet_dist.predict.classify.MAX_BATCH


class ImageClassifier(mlflow.pyfunc.PythonModel):
    """Maps N images to a table of N rows: class names and their probabilities, the best first.

    An image is an encoded file (bytes, or base64 as text) or an array of its pixels, (H, W, C) uint8 of any size. The
    table has the columns `classes` and `probabilities`, lists of `top_k` each.
    """

    # MLflow would refuse arrays where lists are hinted; `images_of` checks every form itself.
    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts["checkpoint"])
        manifest = json.loads((folder / "checkpoint.json").read_text("utf-8"))
        data, self.classes = manifest["recipe"]["data"], manifest["classes"]
        data["evaluation_size"] = data["eval_size"] or data["image_size"]
        self.data = SimpleNamespace(**data)
        self.mean, self.std = tuple(data["mean"]), tuple(data["std"])
        code = _package(Path(context.artifacts["code"]))
        self._decode = importlib.import_module(f"{code}.images.decode")
        self._view = importlib.import_module(f"{code}.images.view")
        network = importlib.import_module(f"{code}.network")
        self._averaged_logits = network.averaged_logits
        options = {name: value for name, value in manifest["recipe"]["model"].items() if name != "init_from"}
        model = network.build_model(**options, in_channels=data["channels"], num_classes=len(self.classes))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        self.device = _device((context.model_config or {}).get("device", "auto"))
        self.model = model.to(self.device).to(memory_format=torch.channels_last).eval()

    # Without a hint for the input, of which MLflow would infer another signature.
    def predict(  # type: ignore[no-untyped-def]
        self, context: Any, model_input, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return a row for each image. Raises MlflowException, which a server answers as 400, for a bad one."""
        top_k = int((params or {}).get("top_k", TOP_K))
        if top_k < 1:
            raise _refused(f"top_k is {top_k}; it must be 1 or more")
        top_k = min(top_k, len(self.classes))
        images = images_of(model_input)
        size = min(self.data.micro_batch_size or self.data.global_batch_size, MAX_BATCH)
        rows: list[tuple[list[str], list[float]]] = []
        for first in range(0, len(images), size):
            probabilities = self.probabilities(self.views(images[first : first + size], first))
            values, labels = probabilities.topk(top_k, dim=1)
            names = [[self.classes[label] for label in row] for row in labels.tolist()]
            rows += zip(names, values.tolist(), strict=True)
        return pd.DataFrame(rows, columns=["classes", "probabilities"])

    def views(self, images: list[Any], first: int = 0) -> np.ndarray:
        """Return what evaluation sees of the images: (N, S, S, C) uint8. first: the number of the first, for errors."""
        numbered = list(enumerate(images, first))
        if len(images) == 1:
            return np.stack([self._view_of(numbered[0])])
        # The decoders release the GIL.
        with ThreadPoolExecutor(min(len(images), os.cpu_count() or 1)) as pool:
            return np.stack(list(pool.map(self._view_of, numbered)))

    def probabilities(self, views_NSSC: np.ndarray) -> torch.Tensor:
        """Return the softmax of the logits, (N, classes), as an evaluation would compute them."""
        pixels = torch.from_numpy(views_NSSC).to(self.device)
        with torch.inference_mode():
            images = self._view.normalize(pixels, self.mean, self.std)
            data = self.data  # Repeats resnet_dist.train.evaluate.logits_of.
            how = {"flip": data.eval_flip, "shift": data.eval_shift, "confidence": data.eval_confidence}
            logits = self._averaged_logits(self.model, images, **how)
            probabilities: torch.Tensor = logits.float().softmax(dim=1).cpu()
        return probabilities

    def _view_of(self, numbered: tuple[int, Any]) -> np.ndarray:
        number, image = numbered
        try:
            if isinstance(image, bytes):
                opened = self._decode.open_image(image, self.data.channels, self.data.max_pixels)
            else:
                opened = self._decode.decoded(_pixels(image, self.data.channels))
            # Copy: the pixels are valid until this thread decodes the next image.
            return np.array(self._view.evaluation_view(opened, self.data))
        except ValueError as problem:
            raise _refused(f"image {number}: {problem}") from None


def images_of(model_input: Any) -> list[Any]:
    """Return the images of an input in any accepted form, each as bytes or as an array.

    Raises MlflowException where there is none, or text is not base64.
    """
    return [_image(number, value) for number, value in enumerate(_values(model_input))]


def _values(given: Any) -> list[Any]:
    """Return one value for each image: bytes, text, an array or nested lists."""
    if isinstance(given, pd.Series):
        return list(given)
    if isinstance(given, pd.DataFrame):
        return _rows(given.to_dict("records"), list(given.columns))
    if isinstance(given, dict):
        return _column(given)
    if isinstance(given, bytes | bytearray | memoryview | str):
        return [given]
    if isinstance(given, np.ndarray) and given.dtype.kind in "OSU":
        given = given.ravel().tolist()
    if isinstance(given, np.ndarray):
        return list(given) if given.ndim == 4 else [given]
    if not isinstance(given, list | tuple):
        raise _refused(f"the input is a {type(given).__name__}; it must be images as bytes, base64 or arrays")
    if any(isinstance(value, dict) for value in given):
        return _rows(given, [IMAGE, PIXELS])
    return [given] if _depth(given) in (1, 2, 3) else [*given]


def _column(given: dict[str, Any]) -> list[Any]:
    """Return the images of one column, or the one image of `{"image": …}`."""
    names = COLUMNS & given.keys()
    if len(names) != 1:
        raise _refused(f"columns {sorted(given)}; there must be either `{IMAGE}` or `{PIXELS}`")
    return _values(given[names.pop()])


def _rows(rows: Iterable[Any], columns: list[Any]) -> list[Any]:
    """Return the image of each row; of a single column any name is right."""
    names = [name for name in columns if name in COLUMNS] or (columns if len(columns) == 1 else [])
    if not names:
        raise _refused(f"columns {columns}; there must be `{IMAGE}` or `{PIXELS}`")
    return [_only(number, row, names) for number, row in enumerate(rows)]


def _only(number: int, row: Any, names: list[Any]) -> Any:
    if not isinstance(row, dict):
        return row
    found = [row[name] for name in names if name in row and not _is_missing(row[name])]
    if len(found) != 1:
        raise _refused(f"image {number}: {len(found)} of {names} are filled; there must be one")
    return found[0]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))


def _depth(values: Any) -> int | None:
    """Return how deep numbers are nested in lists, by the first one: 3 for one image; None where there is none."""
    depth = 0
    while isinstance(values, list | tuple) and len(values):
        values, depth = values[0], depth + 1
    return depth if isinstance(values, int | float) else None


def _image(number: int, value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        text = value.partition(",")[2] if value.startswith("data:") else value
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise _refused(f"image {number}: the text is not base64 of an image's bytes") from None
    return value


def _pixels(value: Any, channels: int) -> np.ndarray:
    """Return an array of pixels as uint8 (H, W, C). Raises ValueError where it is none."""
    array = np.asarray(value)
    if array.ndim == 2 and channels == 1:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape or array.shape[2] != channels:
        raise ValueError(f"pixels of shape {array.shape}; they must be (H, W, {channels})")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind not in "biuf":
        raise ValueError("pixels that are no numbers; they must be integers from 0 to 255")
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        raise ValueError(
            f"pixels of {array.dtype} from {array.min()} to {array.max()}; they must be integers from 0 to 255"
        )
    return array.astype(np.uint8)


def _refused(message: str) -> MlflowException:
    error: MlflowException = MlflowException.invalid_parameter_value(message)
    return error


def _device(name: str) -> torch.device:
    """Return the device for `device` of the model's config: auto is a GPU that torch can use, else the CPU."""
    name = os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE") or name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _package(folder: Path) -> str:
    """Return the name under which the code in `folder` can be imported.

    Models of several versions may be loaded in one process: each gets its own code.
    """
    name = f"resnet_dist_model_{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[name] = importlib.util.module_from_spec(spec)
    return name


mlflow.models.set_model(ImageClassifier())
