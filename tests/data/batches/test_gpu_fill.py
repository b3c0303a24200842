"""Batches that a GPU decodes: the same samples, boxes and draws; on a CPU the same calls decode with libjpeg-turbo."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_dist.config import Data, Recipe
from resnet_dist.data.batches import loader as loaders
from resnet_dist.data.batches.loader import Batch, Loader
from resnet_dist.data.images.device.codec import NvCodec
from resnet_dist.data.images.opened import Box
from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import read_index
from resnet_dist.data.shards.names import expand
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.errors import RecipeError, UserError
from resnet_dist.order.samples import PADDING, Order
from resnet_dist.train import loop
from resnet_dist.train.evaluate import evaluation_order
from resnet_dist.train.tracker import NullTracker
from resnet_dist.world import World
from tests.data.conftest import write_members
from tests.data.images.pictures import jpeg, photo, saved

pytestmark = pytest.mark.skipif(
    find_spec("nvidia") is None or find_spec("nvidia.nvimgcodec") is None,
    reason="nvImageCodec is not installed",
)
SIZE, COUNT = 48, 22
BAD, GREY, TURNED, PNG, BROKEN = 3, 5, 7, 9, 11


def encoded(number: int) -> tuple[str, bytes]:
    # Less than twice SIZE: the CPU would decode a larger crop at half the scale.
    image = photo(60 + number, 90)
    if number == BAD:
        return "jpg", b"no image"
    if number == GREY:
        return "jpg", jpeg(image.convert("L"))
    if number == TURNED:
        exif = Image.Exif()
        exif[0x0112] = 6
        return "jpg", jpeg(image, exif=exif)
    if number == PNG:
        return "png", saved(image, "png")
    content = jpeg(image)
    return "jpg", content[: len(content) // 2] if number == BROKEN else content


@pytest.fixture
def data(tmp_path: Path) -> Data:
    members = []
    for number in range(COUNT):
        form, content = encoded(number)
        members += [(f"{number:03d}.{form}", content), (f"{number:03d}.cls", b"%d" % (number % 4))]
    write_members(tmp_path / "0.tar", members)
    build_index(expand([str(tmp_path / "0.tar")]), tmp_path, CacheLimits(tmp_path / "cache", 1, 1.0))
    return Data(
        train=str(tmp_path),
        eval=str(tmp_path),
        image_size=SIZE,
        global_batch_size=8,
        lanes=2,
        crop="random-resized-crop",
        flip=True,
        erase=0.5,
        eval_crop=0.875,
        max_bad_fraction=1,
    )


def batches(data: Data, *, training: bool = True) -> tuple[list[Batch], int]:
    index = read_index(data.train)
    order = Order(index.counts, data.global_batch_size, data.lanes, data.window, 0, training=True)
    order = order if training else evaluation_order(index, data)
    steps = order.steps_per_epoch  # Beyond, nothing is decoded ahead, and counted.
    with Loader(index, order, data, World.single(), seed=0, total_steps=steps) as loader:
        return [loader.batch_at(step) for step in range(steps)], loader.num_decoded_on_cpu


CHANGES: list[dict[str, object]] = [
    {},
    {"repeats": 2},
    {"resize": "random"},
    {"crop": "pad-crop", "pad": 3},
    {"crop": "none", "flip": False, "erase": 0},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_the_batches_are_those_of_the_cpu(data: Data, changes: dict[str, object], training: bool) -> None:
    data = Data.model_validate(data.model_dump() | changes)
    expected, none = batches(data, training=training)
    found, on_cpu = batches(data.model_copy(update={"decode": "gpu"}), training=training)
    assert none == 0
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours.ids_B, theirs.ids_B)
        for a, b in ((ours.labels_B, theirs.labels_B), (ours.weights_B, theirs.weights_B)):
            assert torch.equal(a, b)
        assert sorted(ours.bad) == sorted(theirs.bad)
        difference = (ours.images_BSSC.int() - theirs.images_BSSC.int()).abs()
        # torch rounds, and cuts off, in the middle of a resizing of bytes, but not of floats.
        assert difference.max() <= (2 if "resize" not in changes else 40)
        assert difference.float().mean() < 0.5
    seen = [i for batch in found for i in batch.ids_B.tolist() if i != PADDING]
    fallbacks = sum(seen.count(number) for number in (GREY, TURNED, PNG))
    assert on_cpu == fallbacks


class Half:
    """A codec that fails for every second image."""

    def __init__(self, device: torch.device) -> None:
        self._codec, self.asked = NvCodec(device), 0

    def decode(self, boxes: Sequence[tuple[bytes, Box]]) -> list[torch.Tensor | None]:
        self.asked += len(boxes)
        return [pixels if i % 2 else None for i, pixels in enumerate(self._codec.decode(boxes))]


def test_what_the_codec_cannot_decode_is_decoded_on_the_cpu_and_counted(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = batches(data)
    monkeypatch.setattr(loaders, "NvCodec", Half)
    found, on_cpu = batches(data.model_copy(update={"decode": "gpu"}))
    assert on_cpu > COUNT // 3
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.weights_B, theirs.weights_B)
        assert (ours.images_BSSC.int() - theirs.images_BSSC.int()).abs().max() <= 2


def test_a_codec_that_is_missing_is_one_sentence(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_dist.data.images.device import codec

    def missing(*plugins: str) -> None:
        raise ImportError("nvImageCodec is not installed")

    monkeypatch.setattr(codec, "import_codec", missing)
    with pytest.raises(UserError, match=r"^data.decode='gpu' needs nvImageCodec .* or use data.decode=cpu$"):
        batches(data.model_copy(update={"decode": "gpu"}))


def test_without_cuda_the_recipe_is_refused(digits_recipe: Recipe, tmp_path: Path) -> None:
    recipe = digits_recipe.with_overrides(
        ["data.decode=gpu", "data.channels=3", "data.mean=[0,0,0]", "data.std=[1,1,1]", "data.cache=none"]
    )
    with pytest.raises(
        RecipeError, match=r"^data.decode='gpu' needs a CUDA device, and this is cpu; use data.decode=cpu$"
    ):
        loop.train(recipe, tmp_path, World.single(), NullTracker())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": "ram", "crop": "none"}, "decode='gpu' with cache='ram'"),
        ({"policy": "trivial-augment"}, "decode='gpu' cannot do policy='trivial-augment'"),
        ({"color_jitter": 0.3}, "color_jitter=0.3"),
        ({"channels": 1, "mean": (0.5,), "std": (0.5,)}, "decode='gpu' with channels=1"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(data: Data, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Data.model_validate(data.model_dump() | {"decode": "gpu"} | changes)


def test_the_metric_counts_over_all_ranks(monkeypatch: pytest.MonkeyPatch, data: Data) -> None:
    monkeypatch.setattr(World, "sum", lambda world, tensor: tensor * 2)
    loader = Mock(num_decoded_on_cpu=3)
    on_gpu = data.model_copy(update={"decode": "gpu"})
    assert loop.decoding_metrics(loader, on_gpu, World.single()) == {"data/decoded_on_cpu": 6.0}
    assert loop.decoding_metrics(loader, data, World.single()) == {}
