"""Sources of samples: the name of a data set, or a folder of images → class names and the items of every split."""

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
EVAL_NAMES = ("eval", "val", "valid", "validation", "test")  # eval folder: the first that exists
HELD_OUT = 0.2  # share of the images that becomes the eval split where a source has no splits
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
    """An image that is not read yet."""

    label: int
    extension: str  # without a dot; the format of the encoded bytes
    read: Callable[[], bytes]
    name: str = ""  # for messages: the file, or the number in the set
    num_bytes: int = 0  # of the file; 0: unknown until it is read


@dataclass(frozen=True)
class Source:
    """A data set that can be prepared."""

    name: str  # part of the file names of its shards
    classes: tuple[str, ...]  # by label
    splits: Mapping[str, Sequence[Item]]  # "train" and "eval"


def open_source(name: str, *, seed: int = 0, whole_split: str | None = None) -> Source:
    """Open `digits`, a data set that torchvision downloads, or a folder of images.

    seed: of the held-out fifth, where the source has no splits. whole_split: put all of a folder without splits into
    this split; None: hold out a fifth as `eval`. Raises UserError where `name` is none of these, cannot be
    downloaded, or has no images.
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
    """Open scikit-learn's 1,797 handwritten digits of 8x8 pixels and 17 grey levels (Kaynak 1995, UCI)."""
    from sklearn.datasets import load_digits  # imported here, because it takes a second

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
    """Open a folder with one folder per class, or with `train/` and one of EVAL_NAMES, each with these folders."""
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
    """Return a folder's name as part of a shard's name, without characters that break a URL or an `.idx`."""
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
    """Split the items at random: a share of HELD_OUT, rounded up, is `eval`, the rest `train`."""
    shuffled = permutation(len(items), Purpose.SPLIT, seed=seed)
    held_out = set(shuffled[: -(-len(items) // round(1 / HELD_OUT))].tolist())
    return {
        "train": [item for number, item in enumerate(items) if number not in held_out],
        "eval": [item for number, item in enumerate(items) if number in held_out],
    }
