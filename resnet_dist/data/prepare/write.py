"""Write shards: each from its own samples alone, so that processes can write them side by side and in any order."""

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

from resnet_dist.config.data.reading import MAX_PIXELS
from resnet_dist.data.images.decode import open_image, whole
from resnet_dist.data.images.formats import describe, format_of
from resnet_dist.data.prepare.items import Item
from resnet_dist.data.prepare.seekable import make_seekable, reason_unchanged
from resnet_dist.data.shards.index import Shard
from resnet_dist.data.shards.members import WEBDATASET, Member
from resnet_dist.data.shards.offsets import idx_path, read_idx, write_idx
from resnet_dist.data.shards.tar import TarError, group_samples
from resnet_dist.errors import UserError
from resnet_dist.search_path import safe_children
from resnet_dist.system.files import checksum
from resnet_dist.system.signals import IGNORABLE_SIGNALS, kept_from_children

SHARD_BYTES = 256 * 2**20  # default size of a shard: 100 to 500 MB suit object stores and local disks
# Extensions that webdataset's decoders do not know, and the usual one of the same format.
_WRITTEN_AS = {"jpe": "jpg", "jfif": "jpg", "jif": "jpg", "apng": "png"}


@dataclass(frozen=True)
class PrepareOptions:
    """The options that decide what is in the shards of a split: either `shards` of them, or of about `shard_bytes`."""

    seed: int = 0
    shards: int | None = None
    shard_bytes: int = SHARD_BYTES
    # Pixels. An image with a longer short side is shrunk to it, and encoded as JPEG.
    resize_short: int | None = None
    quality: int = 92  # the quality of these JPEGs
    max_pixels: int = MAX_PIXELS  # larger images are left out
    strict: bool = False  # fail where anything would be left out
    allow_empty: bool = False  # Keep classes without an image that can be read.
    seekable: bool = False  # write JPEGs anew, see seekable.py


@dataclass(frozen=True)
class ShardTask:
    """A shard to be written."""

    path: Path
    items: Sequence[Item]
    first_key: int  # number of the first sample in its split; the others follow
    options: PrepareOptions


@dataclass(frozen=True)
class WrittenShard:
    """A shard on disk."""

    shard: Shard
    # Position in the task's items, kind of reason and details of each image that was left out.
    left_out: list[tuple[int, str, str]]
    # Position and reason of each image that should be seekable and is not.
    unchanged: list[tuple[int, str]]


def write_shards(tasks: list[ShardTask], num_workers: int) -> Iterator[tuple[ShardTask, WrittenShard]]:
    """Write the shards in `num_workers` processes and yield each when it is on disk.

    Raises UserError where a file cannot be written, or a process was killed.
    """
    if num_workers == 1 or len(tasks) == 1:
        for task in tasks:
            yield task, _write_shard(task)
        return
    # Not fork: a fork of a process with threads may hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(tasks)), spawn, initializer=_start_worker) as pool:
        try:
            # They ignore it only once they have imported this module.
            with kept_from_children(signal.SIGINT, *IGNORABLE_SIGNALS), safe_children():
                futures = {pool.submit(_write_shard, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                f"one of {num_workers} processes was killed, most likely because memory ran out; repeat the same "
                "call to resume, with fewer --workers it takes less"
            ) from None
        finally:
            # Let the workers finish the shards they have begun, but begin no others.
            pool.shutdown(wait=True, cancel_futures=True)


def _write_shard(task: ShardTask) -> WrittenShard:
    """Write one shard, or keep the one that an earlier call wrote. Lists the images that could not be read.

    The shard is written once more where a missing image can be read by now, or where it holds a sample of another
    shard, as after a change of the number of shards.
    """
    if not (task.path.exists() and idx_path(task.path).exists()):
        _write_tar(task)
    for is_last in (False, True):
        shard = _index_tar(task.path)
        samples = read_idx(idx_path(task.path))
        keys = {members[0].key for members in samples}
        expected = {
            _key(n): n - task.first_key for n in range(task.first_key, task.first_key + len(task.items))
        }
        missing = [position for key, position in expected.items() if key not in keys]
        problems = [_problem(task.items[position], task.options) for position in missing]
        if is_last or (None not in problems and keys <= expected.keys()):
            break
        _write_tar(task)
    intermittent = ("cannot be read at times", "it could be read now, but not when its shard was written")
    return WrittenShard(
        shard,
        [(position, *(problem or intermittent)) for position, problem in zip(missing, problems, strict=True)],
        _unchanged(task, samples) if task.options.seekable else [],
    )


def _unchanged(task: ShardTask, samples: Sequence[Sequence[Member]]) -> list[tuple[int, str]]:
    """Read the shard for its images that are not seekable: an earlier call may have written it."""
    found = []
    with task.path.open("rb") as file:
        for image in map(WEBDATASET.image, samples):
            if image is None:
                continue
            file.seek(image.offset)
            reason = reason_unchanged(file.read(image.size))
            if reason is not None:
                found.append((int(image.key) - task.first_key, reason))
    return found


def _write_tar(task: ShardTask) -> None:
    """Write the tar aside, flush it to disk and rename it. Leaves out images that cannot be read."""
    from webdataset import TarWriter

    partial_path = task.path.with_name(f".{task.path.name}.partial")
    try:
        with partial_path.open("wb") as file:
            # Fix time and owner: the same samples must give the same bytes on any day and machine.
            with TarWriter(file, mtime=0, encoder=False, compress=False, user="", group="") as writer:
                for number, item in enumerate(task.items, start=task.first_key):
                    try:
                        extension, data = encode(item, task.options)
                    except (OSError, ValueError):
                        continue  # `_write_shard` finds that it is missing and reports why
                    writer.write({"__key__": _key(number), extension: data, "cls": b"%d" % item.label})
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # The output failed, as on a full disk: errors of an image are caught above.
        partial_path.unlink(missing_ok=True)
        raise UserError(
            f"{task.path}: could not be written ({error}); repeat the same call to resume"
        ) from None
    except BaseException:
        partial_path.unlink(missing_ok=True)
        raise
    partial_path.replace(task.path)


def encode(item: Item, options: PrepareOptions) -> tuple[str, bytes]:
    """Return extension and bytes to write: the item's own bytes, unless the image must be shrunk.

    The bytes decide the extension where the name is wrong. Raises OSError or ValueError where the image cannot be
    read and decoded.
    """
    return _encode(item.extension, item.read(), options)


def _encode(extension: str, data: bytes, options: PrepareOptions) -> tuple[str, bytes]:
    extension, data = _resized(extension, data, options)
    return extension, (make_seekable(data) or data) if options.seekable else data


def _resized(extension: str, data: bytes, options: PrepareOptions) -> tuple[str, bytes]:
    image = open_image(data, 3, options.max_pixels)
    short = min(image.height, image.width)
    wanted = min(short, options.resize_short or short)
    # A JPEG of more than `max_pixels` is decoded at a reduced scale, which must suffice for what is written.
    if short // image.min_scale < wanted:
        raise ValueError(
            f"{image.height} x {image.width} pixels are more than {options.max_pixels:,}; raise max_pixels to allow them"
        )
    pixels = whole(image)
    if wanted == short:
        return _extension(extension, data), data
    import simplejpeg

    from resnet_dist.data.images.view import resize

    scale = wanted / short
    small = resize(pixels, round(image.height * scale), round(image.width * scale))
    return "jpg", simplejpeg.encode_jpeg(np.ascontiguousarray(small), options.quality, colorsubsampling="420")


def _extension(extension: str, data: bytes) -> str:
    form = format_of(data)
    if form is not None and extension not in form.extensions:
        extension = form.extensions[0]
    return _WRITTEN_AS.get(extension, extension)


def _problem(item: Item, options: PrepareOptions) -> tuple[str, str] | None:
    """Return why an image cannot be written, as kind and details; None where it can."""
    try:
        data = item.read()
    except PermissionError:
        return "no permission to read it", ""
    except OSError as error:
        return "a file that cannot be read", str(error.strerror or error)
    try:
        _encode(item.extension, data, options)
    except (OSError, ValueError) as error:
        if format_of(data) is None:
            kind, _, detail = describe(data).partition(" (")
            return kind, detail.removesuffix(")")
        detail = str(error).removeprefix("not a readable image: ")
        if "pixels are more than" in detail:
            advice = "--max-pixels allows them, and --resize-short shrinks most JPEGs"
            return "an image of more than --max-pixels", detail.replace(
                "raise max_pixels to allow them", advice
            )
        return "an image that cannot be decoded", detail
    return None


def _key(number: int) -> str:
    return f"{number:09d}"


def _index_tar(path: Path) -> Shard:
    """Write the `.idx` of a tar; return its size, checksum and number of samples. Raises TarError."""
    with path.open("rb") as file:
        samples = list(group_samples(file, str(path)))
    if not write_idx(idx_path(path), samples):
        raise TarError(f"{path}: a member's name has a space")
    return Shard(str(path), path.stat().st_size, checksum(path), len(samples))


def _start_worker() -> None:
    """Prepare a worker process: it ignores interruptions, which the parent handles, and ends when that has died."""
    for number in (signal.SIGINT, *IGNORABLE_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    _import_webdataset_without_torch()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _import_webdataset_without_torch() -> None:
    """Import webdataset as if torch were not installed: torch would cost every worker seconds and 300 MB."""
    if "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import webdataset  # noqa: F401
    finally:
        del sys.modules["torch"]  # allow its import again: shrinking needs it
