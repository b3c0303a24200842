"""A GPU's bytes against a CPU's: cache=device, resizing, decoding; and the speed of each way."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from resnet_dist.config import Data
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.images.augment import normalize
from resnet_dist.data.images.device.resize import resize_exactly
from resnet_dist.data.shards.index import read_index
from resnet_dist.order.samples import Order
from resnet_dist.order.sizes import Sizes
from resnet_dist.world import World
from tests.benchmarks.gpu.setting import Results, Setting, repeated


def measure(setting: Setting) -> Results:
    yield "process", {"is_a_copy_of_one_that_imported": True, "device": str(setting.device)}
    yield "resizing", resizing(setting)
    if setting.cifar is not None:
        yield from caches(setting)
    if setting.photographs is not None:
        yield from decoding(setting)


def resizing(setting: Setting) -> dict[str, Any]:
    images = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8)
    for size in (24, 28, 31):
        expected = F.interpolate(images.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True)
        found = resize_exactly(images.to(setting.device), size, size).cpu()
        if not torch.equal(found, expected.permute(0, 2, 3, 1)):
            return {"equals_the_cpu": False, "size": size}
    return {"equals_the_cpu": True}


def caches(setting: Setting) -> Results:
    size = setting.choose(512, 16)
    fields = {"image_size": 32, "global_batch_size": size, "crop": "pad-crop", "flip": True, "erase": 0.3}
    train = f"{setting.cifar}/train"
    plain = Data.model_validate({"train": train, "eval": train} | fields)
    steps = setting.choose((0, 1, 45), (0, 1))
    expected = batches(plain, World.single(), steps)
    for cache in ("none", "ram", "device"):
        data = plain.model_copy(update={"cache": cache})
        found = batches(data, setting.world, steps)
        same = all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        yield f"cache={cache}", {"equals_the_cpu": same, "images_per_second": speed(setting, data)}


def decoding(setting: Setting) -> Results:
    """Compare the crops that both decoders make of the same photographs, then measure each."""
    shards = repeated(setting.photographs / "train", setting.work / "decoding", setting.choose(4_096, 32))  # type: ignore[operator]
    size, batch = setting.choose((224, 256), (16, 8))
    fields = {"image_size": size, "global_batch_size": batch, "crop": "random-resized-crop", "flip": True}
    data = Data.model_validate({"train": str(shards), "eval": str(shards), "lanes": 4} | fields)
    on_gpu = data.model_copy(update={"decode": "gpu"})
    steps = (0, 1)
    pairs = zip(batches(data, World.single(), steps), batches(on_gpu, setting.world, steps), strict=True)
    apart = torch.cat([(ours.int() - theirs.int()).abs().flatten() for ours, theirs in pairs]).numpy()
    yield (
        "decode=gpu against decode=cpu",
        {
            "mean_difference_of_255": float(apart.mean()),
            "99th_percentile": float(np.percentile(apart, 99)),
            "largest": int(apart.max()),
        },
    )
    for name, one in (("cpu", data), ("gpu", on_gpu)):
        yield f"decode={name}", {"images_per_second": speed(setting, one)}


def loader_of(data: Data, world: World) -> Loader:
    index = read_index(data.train)
    order = Order(index.counts, data.global_batch_size, data.lanes, data.window, 0, training=True)
    return Loader(index, order, data, world, seed=0, sizes=Sizes.constant(data.image_size))


def batches(data: Data, world: World, steps: tuple[int, ...]) -> list[torch.Tensor]:
    with loader_of(data, world) as loader:
        return [loader.batch_at(step).images_BSSC.cpu() for step in steps]


def speed(setting: Setting, data: Data) -> float:
    """Return images per second of the loader and of normalization, after five steps that are not counted."""
    seconds = setting.choose(3.0, 0.1)
    with loader_of(data, setting.world) as loader:
        for step in range(5):
            loader.batch_at(step)
        start, images, step = setting.now(), 0, 5
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            batch = loader.batch_at(step)
            normalize(batch.images_BSSC, data, torch.bfloat16)
            images, step = images + len(batch.ids_B), step + 1
        return round(images / (setting.now() - start), 1)
