"""Where samples come from before they are shards: a name or a folder → classes and items of every split."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from resnet_dist.data.shards.tar import IMAGE_EXTENSIONS
from resnet_dist.errors import UserError
from resnet_dist.order.philox import Purpose, permutation

IMAGE_SUFFIXES = frozenset(f".{extension}" for extension in IMAGE_EXTENSIONS)
EVAL_NAMES = ("eval", "val", "valid", "validation", "test")  # the first that is there
HELD_OUT = 0.2  # share of a source without splits of its own
DOWNLOADS = Path("~/.cache/resnet-dist/downloads")
TORCHVISION_SETS = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
}
SPLITS = ("train", "eval")


@dataclass(frozen=True)
class Item:
    """One image before it is read. `read` returns the encoded bytes, of the format `extension` names."""

    label: int
    extension: str
    read: Callable[[], bytes]
    name: str = ""  # for a person: the file, or its number in the set
    num_bytes: int = 0  # of the file; 0 where it is made when it is read


@dataclass(frozen=True)
class Source:
    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[Item]]  # "train" and "eval"


def open_source(name: str, *, seed: int = 0, whole_split: str | None = None) -> Source:
    """`digits`, a set that torchvision downloads, or a folder of images.

    whole_split: where a folder has no splits of its own, this one gets all of it; None holds a fifth out.
    Raises UserError where `name` is none of these, or cannot be downloaded.
    """
    if name == "digits":
        return _digits(seed)
    if name in TORCHVISION_SETS:
        return _torchvision_set(name)
    if Path(name).is_dir():
        return _image_folder(Path(name), seed, whole_split)
    known = ", ".join(["digits", *TORCHVISION_SETS])
    raise UserError(f"source {name!r} is neither a known data set ({known}) nor a folder of images")


def _torchvision_set(name: str) -> Source:
    import torchvision.datasets

    make = getattr(torchvision.datasets, TORCHVISION_SETS[name])
    folder = DOWNLOADS.expanduser() / name
    try:
        sets = {split: make(str(folder), train=split == "train", download=True) for split in SPLITS}
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"source {name!r}: torchvision could not download it to {folder} ({error}); check the network, or put "
            "its files there"
        ) from None
    splits = {
        split: [
            Item(int(label), "png", partial(_png, np.asarray(image)), f"{name} {split} {number}")
            for number, (image, label) in enumerate(zip(chosen.data, chosen.targets, strict=True))
        ]
        for split, chosen in sets.items()
    }
    return Source(name, tuple(str(c) for c in sets["train"].classes), splits)


def _digits(seed: int) -> Source:
    """1,797 handwritten digits of 8x8 pixels, 17 grey levels (Kaynak 1995, UCI), inside scikit-learn."""
    from sklearn.datasets import load_digits  # a second to import, and only needed here

    bunch = load_digits()
    items = [
        Item(
            int(label), "png", partial(_png, np.round(image * (255 / 16)).astype(np.uint8)), f"digit {number}"
        )
        for number, (image, label) in enumerate(zip(bunch.images, bunch.target, strict=True))
    ]
    return Source("digits", tuple(str(name) for name in bunch.target_names), _hold_out(items, seed))


def _png(pixels_HW: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).save(buffer, format="png")
    return buffer.getvalue()


def _image_folder(folder: Path, seed: int, whole_split: str | None) -> Source:
    """class = folder. `train/` beside `eval/`, `test/` or `val/` are the splits; else a fifth is held out."""
    train = folder / "train"
    evals = [folder / name for name in EVAL_NAMES if (folder / name).is_dir()]
    if train.is_dir() != bool(evals) and any(
        _class_names(split) for split in (train, *evals) if split.is_dir()
    ):
        raise UserError(
            f"{folder}: has {train.name if train.is_dir() else evals[0].name}/ with folders of classes, but "
            f"not {' or '.join(EVAL_NAMES) if train.is_dir() else 'train'} beside it; give that folder itself as the source"
        )
    if not train.is_dir() or not evals:
        classes = _class_names(folder)
        items = _folder_items(folder, classes)
        splits = {whole_split: items} if whole_split else _hold_out(items, seed)
        return Source(_plain(folder.absolute().name), classes, splits)
    classes = _class_names(train)
    unknown = sorted(set(_class_names(evals[0])) - set(classes))
    if unknown:
        raise UserError(f"{evals[0]}: classes {unknown} have no folder in {train}")
    splits = {"train": _folder_items(train, classes), "eval": _folder_items(evals[0], classes)}
    return Source(_plain(folder.absolute().name), classes, splits)


def _plain(name: str) -> str:
    """A folder's name as part of a shard's: what a URL or a `.idx` would choke on is left out."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "images"


def _class_names(folder: Path) -> tuple[str, ...]:
    return tuple(
        sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.is_dir() and not entry.name.startswith((".", "__"))
        )
    )


def _folder_items(folder: Path, classes: tuple[str, ...]) -> list[Item]:
    items = [
        Item(
            label,
            path.suffix.lower().lstrip("."),
            path.read_bytes,
            str(path.relative_to(folder)),
            path.stat().st_size,
        )
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
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
