"""TODO map."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resnet_dist.data.images.decode import open_image, whole
from resnet_dist.data.prepare.sources import Item
from resnet_dist.data.shards.index import Shard, idx_path
from resnet_dist.data.shards.tar import TarError, group_samples, read_idx, write_idx
from resnet_dist.errors import UserError
from resnet_dist.system.files import checksum

SHARD_BYTES = 256 * 2**20  # what a large set is cut into: 100 to 500 MB suit object stores and local disks


@dataclass(frozen=True)
class PrepareOptions:
    """How a source becomes shards. Either `shards` of them, or of about `shard_bytes`."""

    seed: int = 0
    shards: int | None = None
    shard_bytes: int = SHARD_BYTES
    resize_short: int | None = None  # pixels: a longer short side is shrunk to it, and encoded as JPEG
    quality: int = 92
    strict: bool = False  # an image that cannot be read is an error


@dataclass(frozen=True)
class ShardTask:
    """The samples of one shard, and the number of the first one's key."""

    path: Path
    items: Sequence[Item]
    first_key: int
    options: PrepareOptions


@dataclass(frozen=True)
class WrittenShard:
    """A shard on disk, and a line for each image that is left out of it."""

    shard: Shard
    unreadable: list[str]


def write_shards(tasks: list[ShardTask], workers: int) -> Iterator[tuple[ShardTask, WrittenShard]]:
    if workers == 1 or len(tasks) == 1:
        for task in tasks:
            yield task, _write(task)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(min(workers, len(tasks)), spawn, initializer=_start_worker) as pool:
        try:
            futures = {pool.submit(_write, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                f"one of {workers} processes was killed, most likely because memory ran out; the same call goes on "
                "from here, with fewer --workers it takes less"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # shards under way are finished, no other is begun


def _start_worker() -> None:
    """In a worker: Ctrl-C is the parent's to answer, and without the parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import_webdataset_alone()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _import_webdataset_alone() -> None:
    """Without torch, which it does without where there is none: seconds and 300 MB in every worker."""
    if "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import webdataset  # noqa: F401
    finally:
        del sys.modules["torch"]  # shrinking needs it


def _write(task: ShardTask) -> WrittenShard:
    """Write one shard; one that is there already, from an earlier call, is only read.

    What is missing from it is tried again: an image that can be read by now has the shard written once more. So
    has one with a sample that belongs elsewhere.
    """
    if not (task.path.exists() and idx_path(task.path).exists()):
        _write_tar(task)
    for last in (False, True):
        shard = index_shard(task.path)
        keys = {members[0].key for members in read_idx(idx_path(task.path))}
        expected = {_key(n): item for n, item in enumerate(task.items, start=task.first_key)}
        missing = [item for key, item in expected.items() if key not in keys]
        reasons = [_reason(item, task.options) for item in missing]
        if last or (None not in reasons and keys <= expected.keys()):
            break
        _write_tar(task)
    sometimes = "could be read now, but not when its shard was written"
    lines = [f"{item.name}: {reason or sometimes}" for item, reason in zip(missing, reasons, strict=True)]
    return WrittenShard(shard, lines)


def _reason(item: Item, options: PrepareOptions) -> str | None:
    """Why an image cannot be read; None where it can."""
    try:
        encoded(item, options)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _write_tar(task: ShardTask) -> None:
    from webdataset import TarWriter

    partial_path = task.path.with_name(f".{task.path.name}.partial")
    try:
        with partial_path.open("wb") as file:
            # A fixed time and owner, or the same samples would give other bytes tomorrow.
            with TarWriter(file, mtime=0, encoder=False, compress=False, user="", group="") as writer:
                for number, item in enumerate(task.items, start=task.first_key):
                    try:
                        extension, data = encoded(item, task.options)
                    except (OSError, ValueError):
                        continue  # `_write` sees that it is missing, and says why
                    writer.write({"__key__": _key(number), extension: data, "cls": b"%d" % item.label})
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk: not the images' fault
        partial_path.unlink(missing_ok=True)
        raise UserError(
            f"{task.path}: could not be written ({error}); the same call goes on from here"
        ) from None
    except BaseException:
        partial_path.unlink(missing_ok=True)
        raise
    partial_path.replace(task.path)


def _key(number: int) -> str:
    return f"{number:09d}"


def encoded(item: Item, options: PrepareOptions) -> tuple[str, bytes]:
    """Extension and bytes to write: the item's own, untouched, unless it is to be shrunk.

    Raises OSError or ValueError where it cannot be read and decoded.
    """
    data = item.read()
    image = open_image(data, 3)
    pixels = whole(image)
    short = min(image.height, image.width)
    if options.resize_short is None or short <= options.resize_short:
        return item.extension, data
    import simplejpeg

    from resnet_dist.data.images.pixels import resize

    scale = options.resize_short / short
    small = resize(pixels, round(image.height * scale), round(image.width * scale))
    return "jpg", simplejpeg.encode_jpeg(np.ascontiguousarray(small), options.quality, colorsubsampling="420")


def index_shard(path: Path) -> Shard:
    """Read a tar once: write its `.idx`, return its counts and checksum. Raises TarError."""
    with path.open("rb") as file:
        samples = list(group_samples(file, str(path)))
    if not write_idx(idx_path(path), samples):
        raise TarError(f"{path}: a member's name has a space")
    return Shard(str(path), path.stat().st_size, checksum(path), len(samples))
