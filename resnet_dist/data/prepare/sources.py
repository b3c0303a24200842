"""Sources of samples: the name of a data set, a folder of images, or shards → class names, and items of every split."""

from __future__ import annotations

import io
import os
from functools import partial
from pathlib import Path

import numpy as np

from resnet_dist.data.findings import one_line
from resnet_dist.data.prepare.image_folder import FolderOptions, open_image_folder
from resnet_dist.data.prepare.indexed import open_indexed
from resnet_dist.data.prepare.items import Item, Source, hold_out
from resnet_dist.data.prepare.shard_splits import beside, check_indexed, indexes_of
from resnet_dist.errors import UserError
from resnet_dist.system.files import expanded
from resnet_dist.system.redact import redact

DOWNLOADS = Path("~/.cache/resnet-dist/downloads")
TORCHVISION_SETS = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
}
SPLITS = ("train", "eval")


def open_source(
    name: str,
    *,
    seed: int = 0,
    whole_split: str | None = None,
    allow_empty: bool = False,
    output: Path | None = None,
) -> Source:
    """Open `digits`, a data set that torchvision downloads, a folder of images, or shards with an index.

    seed: of the held-out fifth, where the source has no splits. whole_split: scan this split of a folder alone, and
    put all of a folder without splits into it. allow_empty: keep classes of a folder without images. output: a
    folder that is passed over if it lies in the source. Raises UserError where `name` is none of these, cannot be
    downloaded, has no images, or has a class without any.
    """
    if name == "digits":
        return _digits(seed)
    if name in TORCHVISION_SETS:
        return _torchvision_set(name)
    if indexes := indexes_of(name, whole_split, output):
        return open_indexed(name, indexes, beside(name, indexes, whole_split, output))
    if os.path.isdir(name):
        check_indexed(name, whole_split, output)
        return open_image_folder(Path(name), FolderOptions(seed, whole_split, allow_empty, output))
    known = ", ".join(["digits", *TORCHVISION_SETS])
    shown = repr(redact(one_line(name)))
    if os.path.isfile(name):
        raise UserError(
            f"source {shown} is a file; unpack it and give the folder, or make an index of a tar of samples with "
            "`resnet-dist index`, which is a source too"
        )
    raise UserError(
        f"source {shown} is neither a known data set ({known}) nor a folder on this machine: of images, or of shards with "
        "an index, which `resnet-dist index` makes"
    )


def _torchvision_set(name: str) -> Source:
    import torchvision.datasets

    make = getattr(torchvision.datasets, TORCHVISION_SETS[name])
    folder = expanded(DOWNLOADS) / name
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
    return Source("digits", tuple(str(name) for name in bunch.target_names), hold_out(items, seed))


def _png(pixels_HW: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).save(buffer, format="png")
    return buffer.getvalue()
