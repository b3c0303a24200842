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
from resnet_dist.data.batches.bad_samples import check_bad_fraction
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.images.decode import open_image, whole
from resnet_dist.data.shards.index import Index, read_index
from resnet_dist.data.shards.reader import BadSample, ShardReader
from resnet_dist.data.storage.cache.folder import CacheLimits
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
    num_samples: int  # over all rounds; speeds do not count the bad ones
    bad: tuple[str, ...]  # key and reason of each bad sample

    @property
    def share_of_raw(self) -> float | None:
        return self.loader / self.raw if self.raw else None


def bench_loader(data: Data, *, workers: int | None, against_raw: bool, rounds: int = 5) -> LoaderSpeed:
    """Measure `rounds` rounds of the loader, each followed by one of decoding alone if `against_raw`.

    workers: decoding threads, in both. Default: as many as the loader chooses.
    Raises UserError for fewer images than a batch has, TooManyBadSamples where more than `data.max_bad_fraction` of
    the samples are bad: a bad sample costs less time than one that is decoded.
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
        warm_up = _run_for(loader, 0, WARM_UP_SECONDS)  # This starts threads and opens files.
        encoded = _encoded(index, data) if against_raw else []
        speeds: dict[str, list[float]] = {"loader": [], "raw": []}
        runs = [warm_up]
        for _ in range(rounds):
            start = time.perf_counter()
            run = _run_for(loader, runs[-1].next_step, MIN_SECONDS)
            runs.append(run)
            speeds["loader"].append((run.num_samples - len(run.bad)) / (time.perf_counter() - start))
            if encoded:
                speeds["raw"].append(_raw_speed(encoded, data, loader.threads))
    num_samples, bad = sum(run.num_samples for run in runs), tuple(text for run in runs for text in run.bad)
    check_bad_fraction(index.location, bad, num_samples, data.max_bad_fraction)
    raw = statistics.median(speeds["raw"]) if encoded else None
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) reports bytes on macOS, KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return LoaderSpeed(
        rounds, loader.threads, statistics.median(speeds["loader"]), raw, peak, num_samples, bad
    )


@dataclass(frozen=True)
class _Run:
    """Batches that were loaded one after another, and those that were decoded ahead."""

    next_step: int
    num_samples: int
    bad: list[str]  # key and reason of each bad sample


def _run_for(loader: Loader, step: int, seconds: float) -> _Run:
    """Load whole batches for at least `seconds`.

    Nothing is decoded ahead at the start or at the end, so exactly the images that were decoded here are counted.
    """
    start, num_samples, bad = time.perf_counter(), 0, list[str]()
    while num_samples == 0 or time.perf_counter() - start < seconds:
        batch = loader.batch_at(step)
        num_samples += len(batch.ids_B)
        bad += batch.bad
        step += 1
    num_ahead, bad_ahead = loader.drain()
    return _Run(step, num_samples + num_ahead, bad + bad_ahead)


def _encoded(index: Index, data: Data) -> list[bytes]:
    """Read about RAW_IMAGES good images, spread over the whole set."""
    reader, images = ShardReader(index, CacheLimits.of(data)), []
    try:
        for sample_id in range(0, index.num_samples, -(-index.num_samples // RAW_IMAGES)):
            try:
                image = reader.read(sample_id).image
                whole(open_image(image, data.channels, data.max_pixels))
                images.append(image)
            except UserError:
                raise
            except (BadSample, ValueError):
                continue
    finally:
        reader.close()
    return images


def _raw_speed(encoded: list[bytes], data: Data, threads: int) -> float:
    """Measure images per second of decoding whole images: the limit of a loader that decodes images whole."""

    def decode(images: Iterable[bytes]) -> None:
        for image in images:
            whole(open_image(image, data.channels, data.max_pixels))

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
