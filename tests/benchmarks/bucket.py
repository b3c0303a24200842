"""Shards in a bucket against the same shards on this disk, and obstore against fsspec for their transfer.

    python -m tests.benchmarks.bucket [--megabytes-per-second N] [--latency-ms N] transfers
    python -m tests.benchmarks.bucket [--megabytes-per-second N] [--latency-ms N] epochs IMAGES

The bucket is bucket_server.py in a process of its own, on the same machine: its CPU is the loader's too, and is shown.
All contestants take turns within each round; medians over the rounds.

transfers: shards of 64 MiB into files, four at a time, as the shard cache fetches them; and the time to the first bytes
of an object. epochs: an epoch of the loader alone, two threads, 224 pixels, from local files, from the bucket into an
empty cache, and from that cache. IMAGES is an image folder (class = folder) of JPEGs. Alone it uses all CPUs, so whatever
a transfer takes of them is missing; --pace 0.8 takes batches no faster than 0.8 of what local files give, as a model
does that leaves the loader some time.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from resnet_dist.config import Data
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare
from resnet_dist.data.prepare.write import PrepareOptions
from resnet_dist.data.shards.index import read_index
from resnet_dist.data.storage import transfer
from resnet_dist.data.storage.retry import Patience
from resnet_dist.data.storage.shard_cache import NUM_FETCH_THREADS
from resnet_dist.order.samples import Order
from resnet_dist.world import World
from tests.benchmarks.loader_peers import repeat

BUCKET, SHARD_BYTES, NUM_SHARDS = "shards", 64 * 2**20, 8
FIRST_BYTES, NUM_FIRST = 2**16, 20
WORKERS, BATCH, SIZE, WINDOW = 2, 64, 224, 1024
TIMEOUT_SECONDS = 120.0


@dataclass
class Bucket:
    """The server's process, and the CPU seconds it has used."""

    process: subprocess.Popen[str]

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(folder: Path, chosen: argparse.Namespace) -> Iterator[Bucket]:
    """Serve `folder` as a bucket, and let this process find it."""
    options = [f"--latency-ms={chosen.latency_ms}"]
    if chosen.megabytes_per_second is not None:
        options.append(f"--megabytes-per-second={chosen.megabytes_per_second}")
    (folder / BUCKET).mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.benchmarks.bucket_server", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": process.stdout.readline().strip(),
        }
        yield Bucket(process)
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True)
class Cost:
    """The cost of some work."""

    seconds: float
    user: float  # CPU seconds of this process
    system: float
    server: float  # CPU seconds of the bucket


@contextmanager
def timed(bucket: Bucket, costs: list[Cost]) -> Iterator[None]:
    """Append to `costs` what the block took."""
    before, server, begin = (
        resource.getrusage(resource.RUSAGE_SELF),
        bucket.cpu_seconds(),
        time.perf_counter(),
    )
    yield
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    costs.append(Cost(seconds, user, system, bucket.cpu_seconds() - server))


@contextmanager
def through(client: str) -> Iterator[None]:
    """Let shards be read through fsspec alone, where the client is that."""
    if client == "fsspec":
        with mock.patch.object(transfer, "stream_of", return_value=None):
            yield
    else:
        yield


def measure_transfers(chosen: argparse.Namespace, work: Path) -> None:
    folder, costs, firsts = (
        work / "served",
        defaultdict[str, list[Cost]](list),
        defaultdict[str, list[float]](list),
    )
    (folder / BUCKET).mkdir(parents=True)
    for number in range(NUM_SHARDS):
        (folder / BUCKET / f"{number}.tar").write_bytes(os.urandom(SHARD_BYTES))
    with served(folder, chosen) as bucket:
        for number in range(1 + chosen.rounds):
            for client in ("fsspec", "obstore"):
                with through(client):
                    found: list[Cost] = []
                    with timed(bucket, found), ThreadPoolExecutor(NUM_FETCH_THREADS) as pool:
                        list(pool.map(partial(fetch, work), range(NUM_SHARDS)))
                    if number:  # The first round opens connections.
                        costs[client] += found
                        firsts[client] += [seconds_to_first_bytes() for _ in range(NUM_FIRST)]
    gigabytes = NUM_SHARDS * SHARD_BYTES / 1e9
    print("client | MB/s | lowest to highest | CPU s/GB: user + system | server's | first bytes, ms")
    for client, some in costs.items():
        rates = [1000 * gigabytes / cost.seconds for cost in some]
        user, system, server = (median_of(some, name) / gigabytes for name in ("user", "system", "server"))
        print(
            f"{client} | {statistics.median(rates):.0f} | {min(rates):.0f} to {max(rates):.0f} | {user:.2f} + {system:.2f} | "
            f"{server:.2f} | {1000 * statistics.median(firsts[client]):.1f}",
            flush=True,
        )


def fetch(work: Path, number: int) -> None:
    partial_file = work / f"{number}.partial"
    partial_file.unlink(missing_ok=True)
    url = f"s3://{BUCKET}/{number}.tar"
    transfer.fetch_file(url, partial_file, num_bytes=SHARD_BYTES, timeout_seconds=TIMEOUT_SECONDS)


def seconds_to_first_bytes() -> float:
    """Return the seconds to the first bytes of an object, by a connection that is open already."""
    patience = Patience("s3://", TIMEOUT_SECONDS)
    remote: Any = transfer._open(f"s3://{BUCKET}/0.tar", patience)
    begin = time.perf_counter()
    if remote._stream is None:
        remote._call("cat_file", remote._path, start=0, end=FIRST_BYTES)
    else:
        assert remote._await(partial(remote._stream.read, 0, FIRST_BYTES), is_limited=True) is not None
    return time.perf_counter() - begin


def median_of(costs: Sequence[Cost], name: str) -> float:
    return statistics.median(getattr(cost, name) for cost in costs)


def measure_epochs(chosen: argparse.Namespace, work: Path) -> None:
    torch.set_num_threads(1)
    folder, costs, waits = (
        work / "served",
        defaultdict[str, list[Cost]](list),
        defaultdict[str, list[float]](list),
    )
    count = repeat(chosen.images, work / "images", chosen.min_images)
    source = open_source(str(work / "images"), whole_split="train")
    prepare(source, folder / BUCKET, PrepareOptions(shard_bytes=chosen.shard_megabytes * 1_000_000))
    local, remote = str(folder / BUCKET / "train"), f"s3://{BUCKET}/train"
    num_bytes = sum(shard.num_bytes for shard in read_index(local).shards)
    seconds = 0.0  # of a step
    with served(folder, chosen) as bucket:
        for number in range(1 + chosen.rounds):
            cache = work / f"cache-{number}"
            for place, url in (("local", local), ("first epoch", remote), ("warm", remote)):
                found: list[Cost] = []
                wait = epoch(url, cache, lambda found=found: timed(bucket, found), seconds)  # type: ignore[misc]
                if number == 0 and place == "local" and chosen.pace is not None:
                    seconds = found[0].seconds * BATCH / count / chosen.pace
                if number:
                    costs[place] += found
                    waits[place].append(wait)
            shutil.rmtree(cache)
    print(f"{count} images of {num_bytes / count / 1000:.0f} kB in {num_bytes / 1e6:.0f} MB")
    print(
        "from | images/s | share of local | lowest to highest | images per CPU s | share of local | server's CPU s | wait, s"
    )
    for place, some in costs.items():
        shares = [base.seconds / cost.seconds for base, cost in zip(costs["local"], some, strict=True)]
        cpu, base_cpu = (
            statistics.median(cost.user + cost.system for cost in those) for those in (some, costs["local"])
        )
        print(
            f"{place} | {count / median_of(some, 'seconds'):.0f} | {statistics.median(shares):.3f} | "
            f"{min(shares):.3f} to {max(shares):.3f} | {count / cpu:.0f} | {base_cpu / cpu:.3f} | "
            f"{median_of(some, 'server'):.2f} | {statistics.median(waits[place]):.2f}",
            flush=True,
        )


def epoch(url: str, cache: Path, clock: Callable[[], Any], step_seconds: float) -> float:
    """Load an epoch within `clock()`, with so many seconds after each batch; return those until the first one."""
    data = Data(
        train=url,
        eval=url,
        image_size=SIZE,
        global_batch_size=BATCH,
        crop="random-resized-crop",
        flip=True,
        loader_workers=WORKERS,
        lanes=1,
        window=WINDOW,
        shard_cache=str(cache),
    )
    index = read_index(url)
    order = Order(index.counts, BATCH, data.lanes, data.window, 0, training=True)
    with clock():
        begin = time.perf_counter()
        with Loader(index, order, data, World.single(), seed=0, total_steps=order.steps_per_epoch) as loader:
            loader.batch_at(0)
            first = time.perf_counter() - begin
            for step in range(1, order.steps_per_epoch):
                time.sleep(step_seconds)
                loader.batch_at(step)
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes-per-second", type=float)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("transfers")
    epochs = parts.add_parser("epochs")
    epochs.add_argument("images", type=Path)
    epochs.add_argument("--min-images", type=int, default=4000)
    epochs.add_argument("--pace", type=float)
    epochs.add_argument("--shard-megabytes", type=int, default=32)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        (measure_transfers if chosen.part == "transfers" else measure_epochs)(chosen, Path(work))


if __name__ == "__main__":
    main()
