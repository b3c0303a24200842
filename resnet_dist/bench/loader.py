"""`resnet-dist bench loader`: images per second of the loader, and in turn with it of decoding alone."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from resnet_dist.config import Data
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.images.decode import open_image, whole
from resnet_dist.data.shards.index import read_index
from resnet_dist.data.shards.reader import BadSample, ShardReader
from resnet_dist.data.storage.shard_cache import CacheLimits
from resnet_dist.errors import UserError
from resnet_dist.order.samples import Order
from resnet_dist.system.cpus import cpu_count
from resnet_dist.world import World

RAW_IMAGES = 2000  # encoded images held in memory for the rounds that only decode
WARM_UP_SECONDS = 0.2
MIN_SECONDS = 1.0  # A shorter round would measure the machine's noise.


@dataclass(frozen=True)
class LoaderSpeed:
    """Medians over all rounds, in images per second."""

    rounds: int
    threads: int
    loader: float
    raw: float | None  # decoding alone, by as many threads, without keeping the pixels
    peak_bytes: int  # memory of the process over all rounds

    @property
    def share_of_raw(self) -> float | None:
        return self.loader / self.raw if self.raw else None


def bench_loader(data: Data, *, workers: int | None, against_raw: bool, rounds: int = 5) -> LoaderSpeed:
    """Measure `rounds` rounds of the loader, each followed by one of decoding alone if `against_raw`.

    workers: decoding threads, in both. Default: as many as the loader chooses.
    Raises UserError for fewer images than a batch has.
    """
    torch.set_num_threads(cpu_count())  # Use the CPUs that a single rank has: torch's default counts cores.
    data = data.model_copy(update={"loader_workers": workers})
    index = read_index(data.train)
    order = Order(index.counts, data.global_batch_size, data.lanes, data.window, seed=0, training=True)
    if order.steps_per_epoch == 0:
        raise UserError(
            f"{index.location}: {index.num_samples} samples are less than one batch of {data.global_batch_size}; use "
            "a smaller --global-batch-size"
        )
    with Loader(index, order, data, World.single(), seed=0) as loader:
        step = _run_for(loader, 0, WARM_UP_SECONDS)[0]  # This starts threads and opens files.
        encoded = _encoded(ShardReader(index, CacheLimits.of(data)), index.num_samples) if against_raw else []
        speeds: dict[str, list[float]] = {"loader": [], "raw": []}
        for _ in range(rounds):
            start = time.perf_counter()
            step, images = _run_for(loader, step, MIN_SECONDS)
            speeds["loader"].append(images / (time.perf_counter() - start))
            if encoded:
                speeds["raw"].append(_raw_speed(encoded, data.channels, loader.threads))
    raw = statistics.median(speeds["raw"]) if encoded else None
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) reports bytes on macOS, KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return LoaderSpeed(rounds, loader.threads, statistics.median(speeds["loader"]), raw, peak)


def _run_for(loader: Loader, step: int, seconds: float) -> tuple[int, int]:
    """Load whole batches for at least `seconds`. Return the next step, and the number of images decoded.

    Nothing is decoded ahead at the start or at the end, so exactly the images that were decoded here are counted.
    """
    start, images = time.perf_counter(), 0
    while images == 0 or time.perf_counter() - start < seconds:
        images += len(loader.batch_at(step).ids_B)
        step += 1
    return step, images + loader.drain()


def _encoded(reader: ShardReader, num_samples: int) -> list[bytes]:
    """Read about RAW_IMAGES good images, spread over the whole set."""
    images = []
    try:
        for sample_id in range(0, num_samples, -(-num_samples // RAW_IMAGES)):
            try:
                image = reader.read(sample_id).image
                whole(open_image(image, 3))
                images.append(image)
            except UserError:
                raise
            except (BadSample, ValueError):
                continue
    finally:
        reader.close()
    return images


def _raw_speed(encoded: list[bytes], channels: int, threads: int) -> float:
    """Measure images per second of decoding whole images: the limit of a loader that decodes images whole."""

    def decode(images: Iterable[bytes]) -> None:
        for image in images:
            whole(open_image(image, channels))

    rounds = 0
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        while rounds == 0 or time.perf_counter() - start < MIN_SECONDS:
            parts = [encoded[i : i + 16] for i in range(0, len(encoded), 16)]
            # Exhaust the results: this waits for the threads, and raises their errors.
            for _ in pool.map(decode, parts):
                pass
            rounds += 1
    return rounds * len(encoded) / (time.perf_counter() - start)
