"""Shards as other programs write them, and loaders over them, for the tests of the data plane."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from resnet_dist.config import Data
from resnet_dist.data.batches.loader import Batch, Loader
from resnet_dist.data.images.decode import open_image, whole
from resnet_dist.data.images.opened import Pixels
from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import Index, Shard
from resnet_dist.data.shards.names import expand
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.order.samples import Order
from resnet_dist.world import World

SIZE = 8
CLASSES = 10


def picture(number: int, size: int = SIZE) -> np.ndarray:
    """Return a random picture, (size, size, 3) uint8, a different one for every number."""
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, form: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=form, **options)
    return buffer.getvalue()


def decode_image(data: bytes, channels: int) -> Pixels:
    """Decode a whole image, (H, W, channels) uint8. Raises ValueError where the bytes cannot be decoded."""
    return whole(open_image(data, channels)).copy()


def write_tar(path: Path, numbers: Sequence[int]) -> None:
    """Write samples as a user of plain webdataset does; a sample's number decides its picture and its label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for number in numbers:
            writer.write(
                {"__key__": f"sample{number:06d}", "png": encoded(picture(number)), "cls": number % CLASSES}
            )


def write_members(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar with these names and contents, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shards(folder: Path, counts: Sequence[int], suffix: str = ".tar") -> list[str]:
    """Write a shard for each count, with samples 0, 1, 2 …, and return their paths."""
    first, names = 0, []
    for shard, count in enumerate(counts):
        path = folder / f"part-{shard:05d}{suffix}"
        write_tar(path, range(first, first + count))
        names.append(str(path))
        first += count
    return names


@pytest.fixture
def limits(tmp_path: Path) -> CacheLimits:
    return CacheLimits(tmp_path / "cache", 2**30, 30.0)


@pytest.fixture
def make_index(limits: CacheLimits) -> Callable[[Sequence[str], Path], Index]:
    def make(names: Sequence[str], out: Path) -> Index:
        shards: list[Shard] = expand(list(names))
        return build_index(shards, out, limits)[0]

    return make


def data_of(index: Index, **changes: object) -> Data:
    fields: dict[str, object] = {
        "train": index.location,
        "eval": index.location,
        "image_size": SIZE,
        "global_batch_size": 48,
        "lanes": 24,
        "window": 50,
        "crop": "pad-crop",
        "pad": 1,
        "flip": True,
        "loader_workers": 2,
    }
    if changes.get("crop", "pad-crop") != "pad-crop":
        del fields["pad"]  # other crops do not read it, and a recipe must not set a field that nothing reads
    return Data.model_validate(fields | changes)


def loaders(index: Index, data: Data, world_size: int, *, training: bool = True) -> list[Loader]:
    import torch

    fields = (index.counts, data.global_batch_size, data.lanes, data.window, 5)
    order = Order(*fields, training=training, repeats=data.repeats)
    worlds = [World(rank, 0, world_size, torch.device("cpu")) for rank in range(world_size)]
    return [Loader(index, order, data, world, seed=5) for world in worlds]


def global_batches(
    index: Index, data: Data, world_size: int, steps: Iterable[int], *, training: bool = True
) -> list[list[Batch]]:
    """Return for every step the batches of all ranks, in the order of the ranks."""
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(loader) for loader in loaders(index, data, world_size, training=training)
        ]
        return [[rank.batch_at(step) for rank in ranks] for step in steps]
