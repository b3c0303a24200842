"""Where samples come from before they are shards: a name or a folder → classes and items of every split."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from resnet_dist.config import UserError
from resnet_dist.data.philox import Purpose, permutation

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
EVAL_NAMES = ("eval", "test", "val", "valid", "validation")
HELD_OUT = 0.2  # share of a source without splits of its own


@dataclass(frozen=True)
class Item:
    """One image before it is read. `read` returns the encoded bytes, of the format `extension` names."""

    label: int
    extension: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Source:
    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[Item]]  # "train" and "eval"


def open_source(name: str, *, seed: int = 0) -> Source:
    """`digits`, or a folder of images. Raises UserError where it is neither."""
    if name == "digits":
        return _digits(seed)
    if Path(name).is_dir():
        return _image_folder(Path(name), seed)
    raise UserError(f"source {name!r} is neither a known data set (digits) nor a folder of images")


def _digits(seed: int) -> Source:
    """1,797 handwritten digits of 8x8 pixels, 17 grey levels (Kaynak 1995, UCI), inside scikit-learn."""
    from sklearn.datasets import load_digits  # a second to import, and only needed here

    bunch = load_digits()
    items = [
        Item(int(label), "png", partial(_png, np.round(image * (255 / 16)).astype(np.uint8)))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    ]
    return Source("digits", tuple(str(name) for name in bunch.target_names), _hold_out(items, seed))


def _png(pixels_HW: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).save(buffer, format="png")
    return buffer.getvalue()


def _image_folder(folder: Path, seed: int) -> Source:
    """class = folder. `train/` beside `eval/`, `test/` or `val/` are the splits; else a fifth is held out."""
    train = folder / "train"
    evals = [folder / name for name in EVAL_NAMES if (folder / name).is_dir()]
    if not train.is_dir() or not evals:
        classes = _class_names(folder)
        return Source(folder.name, classes, _hold_out(_folder_items(folder, classes), seed))
    classes = _class_names(train)
    unknown = sorted(set(_class_names(evals[0])) - set(classes))
    if unknown:
        raise UserError(f"{evals[0]}: classes {unknown} have no folder in {train}")
    splits = {"train": _folder_items(train, classes), "eval": _folder_items(evals[0], classes)}
    return Source(folder.name, classes, splits)


def _class_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))


def _folder_items(folder: Path, classes: tuple[str, ...]) -> list[Item]:
    items = [
        Item(label, path.suffix.lower().lstrip("."), path.read_bytes)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not items:
        raise UserError(f"{folder}: no images; expected one folder per class, with {sorted(IMAGE_SUFFIXES)}")
    return items


def _hold_out(items: Sequence[Item], seed: int) -> dict[str, Sequence[Item]]:
    shuffled = permutation(len(items), Purpose.SPLIT, seed=seed)
    held_out = set(shuffled[: -(-len(items) // round(1 / HELD_OUT))].tolist())  # rounded up
    return {
        "train": [item for number, item in enumerate(items) if number not in held_out],
        "eval": [item for number, item in enumerate(items) if number in held_out],
    }
