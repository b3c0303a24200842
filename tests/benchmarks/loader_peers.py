# /// script
# requires-python = ">=3.11"
# dependencies = ["resnet-dist", "litdata", "mosaicml-streaming", "nvidia-dali-cuda130", "spdl", "torchcodec", "grain"]
# ///
"""Images per second of our loader and its peers, each with two workers, in turn; medians over the rounds.

    uv run --with litdata --with mosaicml-streaming --with nvidia-dali-cuda130 --with spdl --with torchcodec --with grain \
        python -m tests.benchmarks.loader_peers IMAGES [--peers dali,spdl]

IMAGES is an image folder (class = folder) of JPEGs. Every loader yields batches of random resized crops of 224 pixels,
antialiased, flipped at random, as uint8; the first round of each is not counted. `raw` only decodes whole images, with
two threads. A peer that is not installed, or fails, is left out and named. --seekable adds ours, DALI and `raw` once more,
on the same images as `prepare --seekable` writes them.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.benchmarks import peer_pipelines
from tests.benchmarks.peer_pipelines import BATCH, SIZE, WORKERS


def repeat(images: Path, folder: Path, min_images: int) -> int:
    """Link the images into `folder`, repeated to `min_images` or more, and return their number.

    With only a few hundred images, worker processes would never warm up.
    """
    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    times = -(-min_images // len(files))
    for number in range(times):
        for path in files:
            target = folder / path.parent.name / f"{number}-{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.absolute())
    return times * len(files)


def transform() -> Callable[[Any], torch.Tensor]:
    from torchvision.transforms import v2

    return v2.Compose(
        [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )


def image_folder(folder: Path, work: Path) -> Any:
    from torchvision.datasets import ImageFolder

    return torch.utils.data.DataLoader(
        ImageFolder(folder, transform()), BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True
    )


def webdataset(folder: Path, work: Path) -> Any:
    import webdataset as wds

    urls = [str(path) for path in sorted((work / "shards/train").glob("*.tar"))]
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;jpeg", "cls")
        .map_tuple(transform(), lambda label: label)
        .batched(BATCH)
    )
    return wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS, persistent_workers=True)


def mosaic(folder: Path, work: Path) -> Any:
    from streaming import MDSWriter, StreamingDataset

    target = work / "mds"
    with MDSWriter(out=str(target), columns={"image": "jpeg", "label": "int"}) as writer:
        for label, name in enumerate(sorted(path.name for path in folder.iterdir())):
            for path in sorted((folder / name).iterdir()):
                writer.write({"image": Image.open(path), "label": label})

    class Transformed(StreamingDataset):  # type: ignore[misc]
        change = transform()

        def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(at)
            return self.change(sample["image"].convert("RGB")), sample["label"]

    dataset = Transformed(local=str(target), shuffle=True, batch_size=BATCH)
    return torch.utils.data.DataLoader(dataset, BATCH, num_workers=WORKERS, persistent_workers=True)


def lit_sample(item: tuple[str, int]) -> dict[str, Any]:
    path, label = item
    return {"image": Path(path).read_bytes(), "label": label}


def litdata(folder: Path, work: Path) -> Any:
    import litdata as lit

    target = work / "lit"
    names = sorted(path.name for path in folder.iterdir())
    items = [(str(path), names.index(path.parent.name)) for path in sorted(folder.glob("*/*"))]
    lit.optimize(lit_sample, items, output_dir=str(target), chunk_bytes="64MB", num_workers=1)

    class Transformed(lit.StreamingDataset):  # type: ignore[misc]
        change = transform()

        def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(at)
            return self.change(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]

    dataset = Transformed(str(target), shuffle=True)
    return lit.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)


class Ours:
    def __init__(self, work: Path, shards: str) -> None:
        from resnet_dist.config import Data
        from resnet_dist.data.batches.loader import Loader
        from resnet_dist.data.shards.index import read_index
        from resnet_dist.order.samples import Order
        from resnet_dist.world import World

        location = str(work / shards / "train")
        data = Data(
            train=location,
            eval=location,
            image_size=SIZE,
            global_batch_size=BATCH,
            crop="random-resized-crop",
            flip=True,
            loader_workers=WORKERS,
        )
        index = read_index(location)
        order = Order(index.counts, BATCH, data.lanes, data.window, 0, training=True)
        self.loader = Loader(index, order, data, World.single(), seed=0)
        self.step, self.steps_per_epoch = 0, order.steps_per_epoch

    def __iter__(self) -> Any:
        """Yield one epoch, and count what was decoded beyond its end: nothing is decoded between two rounds."""
        for _ in range(self.steps_per_epoch):
            batch = self.loader.batch_at(self.step)
            self.step += 1
            yield batch.images_BSSC, batch.labels_B
        num_ahead, _ = self.loader.drain()
        self.step += num_ahead // BATCH
        yield torch.empty((num_ahead, 0), dtype=torch.uint8), None


def raw_decode(images: list[bytes]) -> float:
    """Return images per second of decoding alone."""
    import simplejpeg

    def decode(some: list[bytes]) -> None:
        for image in some:
            simplejpeg.decode_jpeg(image, "RGB", strict=False)

    start = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(decode, [images[i : i + 16] for i in range(0, len(images), 16)]):
            pass
    return len(images) / (time.perf_counter() - start)


def epoch(loader: Any) -> float:
    """Return images per second of one epoch."""
    start, images = time.perf_counter(), 0
    for batch, *_ in loader:
        assert batch.dtype == torch.uint8
        images += len(batch)
    return images / (time.perf_counter() - start)


SEEKABLE_PEER = "DALI seekable"
PEERS: dict[str, Callable[[Path, Path], Any]] = {
    "DALI": peer_pipelines.dali,
    SEEKABLE_PEER: peer_pipelines.dali_seekable,
    "SPDL": peer_pipelines.spdl,
    "TorchCodec": peer_pipelines.torchcodec,
    "grain": peer_pipelines.grain,
    "ImageFolder": image_folder,
    "webdataset": webdataset,
    "Mosaic": mosaic,
    "litData": litdata,
}


def open_peers(names: list[str], folder: Path, work: Path) -> dict[str, Any]:
    """Return the loaders that can be made, and have yielded a batch."""
    loaders: dict[str, Any] = {}
    for name in names:
        try:
            made = PEERS[name](folder, work)
            # litData's writer has changed the method.
            torch.multiprocessing.set_start_method("fork", force=True)
            next(iter(made))
            loaders[name] = made
        except Exception as error:
            print(
                f"left out: {name}: {type(error).__name__}: {' '.join(str(error).split())[-300:]}", flush=True
            )
    return loaders


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--peers", default=",".join(name for name in PEERS if name not in ("grain", SEEKABLE_PEER))
    )
    parser.add_argument("--min-images", type=int, default=1600)
    parser.add_argument("--seekable", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work, ours = Path(tempfile.mkdtemp()), list[Ours]()
    try:
        folder = work / "images"
        count = repeat(arguments.images, folder, arguments.min_images)
        names = arguments.peers.split(",") + [SEEKABLE_PEER] * arguments.seekable
        encoded = write_shards(folder, work, seekable=arguments.seekable)
        loaders = open_peers(names, folder, work)
        peers = list(loaders)
        ours = [Ours(work, name) for name in ("shards", "seekable")[: 1 + arguments.seekable]]
        loaders |= dict(zip(("ours", "ours, seekable"), ours, strict=False))
        speeds = measure(loaders, encoded, arguments.rounds)
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        print(
            f"{count} images, {arguments.rounds} rounds, {WORKERS} workers, images/s: median (lowest to highest)"
        )
        for name, values in speeds.items():
            print(f"{name:<14} {medians[name]:7,.0f} ({min(values):,.0f} to {max(values):,.0f})")
        best = max(medians[name] for name in peers)
        for name in [name for name in loaders if name.startswith("ours")]:
            ratios = medians[name] / best, medians[name] / medians["raw"]
            print(f"{name} is {ratios[0]:.2f} x the best peer and {ratios[1]:.2f} x raw decoding")
    finally:
        for one in ours:
            one.loader.close()
        shutil.rmtree(work, ignore_errors=True)


def write_shards(folder: Path, work: Path, *, seekable: bool) -> dict[str, list[bytes]]:
    """Write the images as shards, and return their bytes for raw decoding: as they are, and seekable."""
    from resnet_dist.data.prepare.sources import open_source
    from resnet_dist.data.prepare.split import prepare
    from resnet_dist.data.prepare.write import PrepareOptions
    from resnet_dist.data.shards.reader import ShardReader
    from resnet_dist.data.storage.cache.folder import CacheLimits

    found = {}
    for name, is_seekable in [("shards", False)] + [("seekable", True)] * seekable:
        options, start = PrepareOptions(seekable=is_seekable), time.process_time()
        source = open_source(str(folder), whole_split="train")
        index = prepare(source, work / name, options)["train"]
        reader = ShardReader(index, CacheLimits(work, 1, 1.0))
        images = [reader.read(number).image for number in range(index.num_samples)]
        found["raw, seekable" if is_seekable else "raw"] = images
        seconds = time.process_time() - start
        print(f"{name}: {sum(map(len, images)):,} bytes, written in {seconds:.1f} s of CPU here", flush=True)
    return found


def measure(loaders: dict[str, Any], encoded: dict[str, list[bytes]], rounds: int) -> dict[str, list[float]]:
    """Return images per second of each loader, and of decoding alone, in every round but the first."""
    speeds: dict[str, list[float]] = {name: [] for name in [*loaders, *encoded]}
    for number in range(rounds + 1):
        for name, loader in loaders.items():
            speed = epoch(loader)
            if number:
                speeds[name].append(speed)
        if number:
            for name, images in encoded.items():
                speeds[name].append(raw_decode(images))
    return speeds


if __name__ == "__main__":
    np.random.seed(0)
    main()
