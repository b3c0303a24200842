"""Batches of seekable JPEGs are those of ordinary ones, bit for bit, bad samples among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from resnet_dist.data.batches import fill
from resnet_dist.data.shards.index import Index
from tests.data.conftest import data_of, global_batches, write_members
from tests.data.images.jpeg.test_seekable import seekable, without_table
from tests.data.images.pictures import photo, saved

COUNT = 24


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """Return seekable JPEGs of all kinds, three that are damaged, and images of another format."""
    kinds = [(sampling, interval) for sampling in ("4:4:4", "4:2:0", "4:4:0", "gray") for interval in (3, 6)]
    found = [seekable(20, 24, kind[0], interval=kind[1], off=(3, 5)).data for kind in kinds * 2]
    damaged = [bytearray(image) for image in found[:3]]
    for number, image in enumerate(damaged):
        image[-40 * (number + 1) :] = b"\xff" * 40
    return [*found, *map(bytes, damaged), *(saved(photo(170, 150), "png") for _ in range(COUNT - 19))]


def index_of(
    folder: Path, images: Sequence[bytes], make_index: Callable[[Sequence[str], Path], Index]
) -> Index:
    members = []
    for number, image in enumerate(images):
        extension = "png" if image.startswith(b"\x89PNG") else "jpg"
        members += [(f"{number:03d}.{extension}", image), (f"{number:03d}.cls", b"0")]
    write_members(folder / "a.tar", members)
    return make_index([str(folder)], folder)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [16, 100])  # decoded at a reduced scale, and not
def test_batches_are_those_of_ordinary_files(
    training: bool,
    size: int,
    images: list[bytes],
    tmp_path: Path,
    make_index: Callable[[Sequence[str], Path], Index],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes: dict[str, object] = {
        "crop": "random-resized-crop",
        "image_size": size,
        "global_batch_size": COUNT,
        "lanes": 1,
    }
    batches = []
    for name, files, max_opened in (
        ("ordinary", [without_table(image) for image in images], fill.MAX_OPENED_BYTES),
        ("seekable", images, fill.MAX_OPENED_BYTES),
        ("one-by-one", images, 0),
    ):
        monkeypatch.setattr(fill, "MAX_OPENED_BYTES", max_opened)
        index = index_of(tmp_path / name, files, make_index)
        batches.append(
            global_batches(
                index, data_of(index, **changes), 1, range(2 if training else 1), training=training
            )
        )
    ordinary, *others = [[step[0] for step in steps] for steps in batches]
    for steps in others:
        for ours, theirs in zip(steps, ordinary, strict=True):
            assert torch.equal(ours.images_BSSC, theirs.images_BSSC)
            assert torch.equal(ours.weights_B, theirs.weights_B)
            assert [text.partition("/")[2] for text in ours.bad] == [
                text.partition("/")[2] for text in theirs.bad
            ]
    assert ordinary[0].images_BSSC.any(dim=(1, 2, 3)).sum() >= COUNT - 3
