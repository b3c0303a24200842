"""The loader: the same batches on any number of ranks and after a restart, its threads, and bad samples."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from resnet_dist.config import Data, Recipe
from resnet_dist.data.batches.loader import Batch, Loader
from resnet_dist.data.images.augment import normalize
from resnet_dist.data.images.crop import random_box
from resnet_dist.data.images.view import resize
from resnet_dist.data.shards.index import Index, read_index
from resnet_dist.order.samples import PADDING, Order
from resnet_dist.train.evaluate import evaluation_order
from resnet_dist.world import World
from tests.data.conftest import decode_image, global_batches


def world(rank: int, size: int) -> World:
    return World(rank, 0, size, torch.device("cpu"))


def whole_batches(data: Data, steps: list[int], size: int) -> list[tuple[torch.Tensor, ...]]:
    """Return images, labels, weights and ids of every step, over all ranks."""
    return [
        tuple(torch.cat(tensors) for tensors in zip(*(fields(part) for part in parts), strict=True))
        for parts in global_batches(read_index(data.train), data, size, steps)
    ]


def fields(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.images_BSSC, batch.labels_B, batch.weights_B, torch.from_numpy(batch.ids_B)


@pytest.fixture
def data(digits_recipe: Recipe) -> Data:
    changes = {"crop": "pad-crop", "pad": 1, "flip": True, "window": 64, "loader_workers": 2}
    return digits_recipe.data.model_copy(update=changes)


def test_any_number_of_ranks_and_any_restart_sees_the_same(data: Data) -> None:
    steps = list(range(14))  # An epoch has eleven.
    whole = whole_batches(data, steps, 1)
    for size in (2, 4, 8):
        for ours, theirs in zip(whole_batches(data, steps, size), whole, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for start in (1, 5, 10, 11, 13):
        for ours, theirs in zip(whole_batches(data, steps[start:], 2), whole[start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_small_images_are_decoded_by_one_thread(data: Data) -> None:
    index = read_index(data.train)
    large = replace(index, shards=tuple(replace(s, num_bytes=10_000 * s.num_samples) for s in index.shards))
    first, *rest = index.shards
    unknown = replace(index, shards=(replace(first, num_bytes=0), *rest))
    default = data.model_copy(update={"loader_workers": None})
    recolored = default.model_copy(update={"policy": "trivial-augment"})

    def threads(index: Index, data: Data) -> int:
        order = Order(index.counts, 64, 8, 64, seed=0, training=True)
        with Loader(index, order, data, World.single(), seed=0) as loader:
            return loader.threads

    assert threads(index, default) == 1
    assert threads(index, data) == 2  # `loader_workers` of the fixture
    for other in (default.model_copy(update=u) for u in ({"cache": "ram"}, {"image_size": 224})):
        assert threads(index, other) == 3
    assert threads(index, recolored) == threads(large, default) == threads(unknown, default) == 3


@pytest.mark.usefixtures("three_threads")
def test_torch_starts_no_threads_inside_decoding_threads(data: Data) -> None:
    index = read_index(data.train)
    order = Order(index.counts, 64, 8, 64, seed=0, training=True)
    with Loader(index, order, data, World.single(), seed=0) as loader, ThreadPoolExecutor(1) as other:
        loader.batch_at(0)
        counts = list(loader._pool.map(lambda _: torch.get_num_threads(), range(8)))
        assert counts == [1] * 8
        assert torch.get_num_threads() == 3
        assert other.submit(torch.get_num_threads).result() == 3


def test_without_augmentation_an_id_has_the_same_image_in_every_epoch(data: Data) -> None:
    plain = data.model_copy(update={"crop": "none", "flip": False})
    images: dict[int, torch.Tensor] = {}
    for batch_images, _, _, ids in whole_batches(plain, list(range(11)), 1):
        images |= dict(zip(ids.tolist(), batch_images, strict=True))
    again = whole_batches(plain, list(range(11, 22)), 1)
    same = [
        torch.equal(images[i], image)
        for batch in again
        for image, i in zip(batch[0], batch[3].tolist(), strict=True)
        if i in images
    ]
    assert len(same) > 1300
    assert all(same)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_evaluation_yields_each_sample_once(data: Data, size: int) -> None:
    index = read_index(data.eval)
    order = evaluation_order(index, data)
    ids: list[int] = []
    for rank in range(size):
        with Loader(index, order, data, world(rank, size), seed=0) as loader:
            for step in range(order.steps_per_epoch):
                batch = loader.batch_at(step)
                assert batch.weights_B.tolist() == (batch.ids_B != PADDING).astype(float).tolist()
                ids += batch.ids_B[batch.ids_B != PADDING].tolist()
    assert sorted(ids) == list(range(360))


def test_a_bad_sample_has_weight_zero_and_changes_no_other_sample(data: Data, tmp_path: Path) -> None:
    clean = whole_batches(data, list(range(11)), 1)
    folder = tmp_path / "train"
    shutil.copytree(data.train, folder)
    shard = next(folder.glob("*000001.tar"))
    content = bytearray(shard.read_bytes())
    at = content.index(b"\x89PNG", len(content) // 2)
    content[at : at + 4] = b"JUNK"
    shard.write_bytes(content)
    damaged = data.model_copy(update={"train": str(folder)})
    batches = whole_batches(damaged, list(range(11)), 1)
    bad = 0
    for ours, theirs in zip(batches, clean, strict=True):
        good = ours[2] == 1
        bad += int((~good).sum())
        assert torch.equal(ours[3], theirs[3])
        assert torch.equal(ours[0][good], theirs[0][good])
        assert not ours[0][~good].any()
    assert bad == 1


@pytest.mark.parametrize(("batches", "limit", "expected"), [(5, 2**30, 5), (5, 4 * 8192, 3), (5, 1, 1)])
def test_batches_in_flight_stay_within_their_bytes(
    data: Data, batches: int, limit: int, expected: int
) -> None:
    """A batch of 128 digits has 8,192 bytes; the batch in use counts too."""
    changed = data.model_copy(update={"prefetch_batches": batches, "prefetch_bytes": limit})
    index = read_index(data.train)
    order = Order(index.counts, 128, 8, 64, 3, training=True)
    with Loader(index, order, changed, world(0, 1), seed=3) as loader:
        loader.batch_at(0)
        assert len(loader._ahead) == expected


def test_nothing_is_decoded_beyond_the_end(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    index, requested = read_index(data.train), []
    original = Order.ids_at

    def ids_at(self: Order, step: int, lanes: range) -> np.ndarray:
        requested.append(step)
        return original(self, step, lanes)

    monkeypatch.setattr(Order, "ids_at", ids_at)
    order = Order(index.counts, 128, 8, 64, 3, training=True)
    ahead = data.model_copy(update={"prefetch_batches": 3})
    with Loader(index, order, ahead, world(0, 1), seed=3, total_steps=14) as loader:
        for step in range(8, 14):
            loader.batch_at(step)
    assert requested == list(range(8, 14))
    requested.clear()
    order = evaluation_order(index, data)
    with Loader(index, order, ahead, world(0, 1), seed=0) as loader:
        for _ in range(2):
            for step in range(order.steps_per_epoch):
                loader.batch_at(step)
    assert requested == 2 * list(range(order.steps_per_epoch))


def test_close_ends_the_threads(data: Data) -> None:
    whole_batches(data, [0], 2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.parametrize("data_bytes", [b"", b"not an image", b"\xff\xd8\xff\xe0" + bytes(40)])
def test_bytes_that_are_not_an_image_are_refused(data_bytes: bytes) -> None:
    with pytest.raises(ValueError, match="not a readable image"):
        decode_image(data_bytes, 3)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "I;16"])
def test_every_mode_gives_the_channels_asked_for(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (7, 5)).save(path)
    for channels in (1, 3):
        assert decode_image(path.read_bytes(), channels).shape == (5, 7, channels)


def test_resize_agrees_with_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(pixels).resize((32, 24), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(resize(pixels, 24, 32) - theirs).max() <= 2


def test_random_boxes_lie_inside() -> None:
    draws = np.random.default_rng(0).random((200, 40))
    sizes = [(height, width) for height in (1, 2, 50, 500) for width in (1, 3, 375)]
    for row, (height, width) in zip(draws, sizes * 16, strict=False):
        box = random_box(height, width, 24, row)
        assert box.height >= 1
        assert box.width >= 1
        assert 0 <= box.top <= height - box.height
        assert 0 <= box.left <= width - box.width


def test_normalize(data: Data) -> None:
    images = torch.randint(0, 256, (4, 8, 8, 1), dtype=torch.uint8)
    out = normalize(images, data)
    expected = (images.permute(0, 3, 1, 2) / 255 - data.mean[0]) / data.std[0]
    torch.testing.assert_close(out, expected)
    color = data.model_copy(update={"channels": 3, "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)})
    out = normalize(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), color)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([-0.1, -0.1, -0.1]))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert F.relu(out).sum() == 0
