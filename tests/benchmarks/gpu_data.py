"""The data plane on a machine with a CUDA device. It needs neither Ray nor MLflow.

    python tests/benchmarks/gpu_data.py [SHARDS]

It compares batches of data.cache=device with those of the CPU, byte for byte, and prints images per second of the
three cache modes with images of 32 pixels, and of SHARDS (an index of photographs) at 224 pixels.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from resnet_dist.bench.synthetic import Noise
from resnet_dist.config import Data
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.images.augment import normalize
from resnet_dist.data.prepare.sources import Item, Source
from resnet_dist.data.prepare.split import prepare
from resnet_dist.data.shards.index import read_index
from resnet_dist.order.samples import Order
from resnet_dist.world import World


def loader_of(data: Data, device: str) -> Loader:
    index = read_index(data.train)
    order = Order(index.counts, data.global_batch_size, data.lanes, data.window, 0, training=True)
    return Loader(index, order, data, World(0, 0, 1, torch.device(device)), seed=0)


def speed(data: Data, device: str, seconds: float = 8.0) -> float:
    """Return images per second of the loader and of normalization, after five steps that are not counted."""
    with loader_of(data, device) as loader:
        for step in range(5):
            loader.batch_at(step)
        if device == "cuda":
            torch.cuda.synchronize()
        start, images, step = time.perf_counter(), 0, 5
        while time.perf_counter() - start < seconds:
            batch = loader.batch_at(step)
            normalize(batch.images_BSSC, data, torch.bfloat16)
            images, step = images + len(batch.ids_B), step + 1
        if device == "cuda":
            torch.cuda.synchronize()
        return images / (time.perf_counter() - start)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(torch.cuda.get_device_name() if device == "cuda" else "no CUDA device: a rehearsal on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        items = [Item(number % 10, "jpg", Noise(number, 32), str(number)) for number in range(20_000)]
        prepare(Source("noise", tuple("0123456789"), {"train": items}), Path(folder))
        shards = f"{folder}/train"
        fields = {"image_size": 32, "global_batch_size": 512, "crop": "pad-crop", "flip": True, "erase": 0.3}
        plain = Data.model_validate({"train": shards, "eval": shards} | fields)
        cached = plain.model_copy(update={"cache": "device"})
        with loader_of(plain, "cpu") as ours, loader_of(cached, device) as theirs:
            for step in (0, 1, 45):
                a, b = ours.batch_at(step), theirs.batch_at(step)
                assert torch.equal(a.images_BSSC, b.images_BSSC.cpu()), step
                assert torch.equal(a.labels_B, b.labels_B.cpu()), step
        print("batches of cache=device are those of the CPU, byte for byte")
        for cache in ("none", "ram", "device"):
            data = plain.model_copy(update={"cache": cache})
            print(f"32 pixels, cache={cache:<6} {speed(data, device):12,.0f} images/s")
    if len(sys.argv) > 1:
        fields = {"image_size": 224, "global_batch_size": 256, "crop": "random-resized-crop", "flip": True}
        data = Data.model_validate({"train": sys.argv[1], "eval": sys.argv[1]} | fields)
        print(f"224 pixels, cache=none   {speed(data, device):12,.0f} images/s")


if __name__ == "__main__":
    main()
