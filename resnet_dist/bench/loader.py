"""`resnet-dist bench loader`: images per second of the loader, against decoding alone in the same run."""

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

RAW_IMAGES = 2000  # encoded images that are held in memory for the decode-only rounds
MIN_SECONDS = 1.0  # of one round: shorter ones measure the machine's noise


@dataclass(frozen=True)
class LoaderSpeed:
    """Medians over the rounds, in images per second."""

    rounds: int
    threads: int
    loader: float
    raw: float | None  # decode only, as many threads, results thrown away
    peak_bytes: int  # of the process, all rounds

    @property
    def share_of_raw(self) -> float | None:
        return self.loader / self.raw if self.raw else None


def bench_loader(data: Data, *, workers: int | None, against_raw: bool, rounds: int = 5) -> LoaderSpeed:
    """Epochs through the loader, and in turn with them decoding alone. Raises UserError for too few images."""
    torch.set_num_threads(cpu_count())  # what a rank on its own has; torch counts cores
    data = data.model_copy(update={"loader_workers": workers})
    index = read_index(data.train)
    order = Order(index.counts, data.global_batch_size, data.lanes, data.window, seed=0, training=True)
    if order.steps_per_epoch == 0:
        raise UserError(
            f"{index.location}: {index.num_samples} samples are less than one batch of {data.global_batch_size}; use "
            "a smaller --global-batch-size"
        )
    with Loader(index, order, data, World.single(), seed=0) as loader:
        step = _run_for(loader, 0, 0.2)[0]  # threads started, files opened
        encoded = _encoded(ShardReader(index, CacheLimits.of(data)), index.num_samples) if against_raw else []
        speeds: dict[str, list[float]] = {"loader": [], "raw": []}
        for _ in range(rounds):
            start = time.perf_counter()
            step, images = _run_for(loader, step, MIN_SECONDS)
            speeds["loader"].append(images / (time.perf_counter() - start))
            if encoded:
                speeds["raw"].append(_raw_speed(encoded, data.channels, loader.threads))
    raw = statistics.median(speeds["raw"]) if encoded else None
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) of each
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return LoaderSpeed(rounds, loader.threads, statistics.median(speeds["loader"]), raw, peak)


def _run_for(loader: Loader, step: int, seconds: float) -> tuple[int, int]:
    """Whole batches for at least `seconds`: the next step, and how many images they had.

    It begins and ends with nothing decoded ahead: all that is counted was decoded here, and nothing else was.
    """
    start, images = time.perf_counter(), 0
    while images == 0 or time.perf_counter() - start < seconds:
        images += len(loader.batch_at(step).ids_B)
        step += 1
    return step, images + loader.drain()


def _encoded(reader: ShardReader, num_samples: int) -> list[bytes]:
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
    """Decoding whole images, and nothing else: what no loader that decodes everything can exceed."""

    def decode(images: Iterable[bytes]) -> None:
        for image in images:
            whole(open_image(image, channels))

    rounds = 0
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        while rounds == 0 or time.perf_counter() - start < MIN_SECONDS:
            parts = [encoded[i : i + 16] for i in range(0, len(encoded), 16)]
            for _ in pool.map(decode, parts):
                pass
            rounds += 1
    return rounds * len(encoded) / (time.perf_counter() - start)
