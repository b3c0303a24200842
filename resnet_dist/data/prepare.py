"""Write a source as shuffled WebDataset shards with an index.

What goes into which shard follows from the source and the options alone, so processes can write shards side by
side, an interrupted call can go on, and the same call gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock

from resnet_dist.config import UserError
from resnet_dist.data.decode import open_image, whole
from resnet_dist.data.index import INDEX_NAME, Index, Shard, idx_path, read_index, write_index
from resnet_dist.data.philox import Purpose, permutation
from resnet_dist.data.sources import Item, Source
from resnet_dist.data.storage import checksum
from resnet_dist.data.tar import TarError, group_samples, read_idx, write_idx, write_text_atomically

SHARD_BYTES = 256 * 2**20  # what a large set is cut into: 100 to 500 MB suit object stores and local disks
MIN_SHARDS = 8  # so that several ranks of a small set read different files
PLAN_NAME = ".plan.json"  # of a preparation under way
COUNT_KEY = "number_of_shards"  # in it
LOCK_NAME = ".lock"
REPORT_NAME = "unreadable.txt"
PROBES = 100  # images that are measured to guess what all will take

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How a source becomes shards. Either `shards` of them, or of about `shard_bytes`."""

    seed: int = 0
    shards: int | None = None
    shard_bytes: int = SHARD_BYTES
    resize_short: int | None = None  # pixels: a longer short side is shrunk to it, and encoded as JPEG
    quality: int = 92
    strict: bool = False  # an image that cannot be read is an error


def prepare(
    source: Source,
    out: Path,
    options: Options = Options(),
    *,
    splits: Sequence[str] | None = None,
    workers: int = 1,
    progress: Progress = lambda split, done, total: None,
) -> dict[str, Index]:
    """Write `splits` of `source` (None: all) to `out/SPLIT/`, over as many processes as `workers`.

    Shards are written aside and renamed, the index last: an interrupted call leaves no half-written file under
    a final name, and the same call goes on where it stopped; one that is complete already stays as it is. Same
    source and options give byte-identical shards. Images that cannot be read are left out and listed in
    `unreadable.txt`. `progress(split, done, total)` is called after every shard, in samples.

    Raises UserError where a folder holds something else, or with `strict` where an image cannot be read.
    """
    indexes = {}
    for split in splits or source.splits:
        if split not in source.splits:
            raise UserError(f"--split {split}: {source.name} has {', '.join(source.splits)}")
        tell = partial(progress, split)
        indexes[split] = _prepare_split(source, split, out / split, options, workers, tell)
    return indexes


def _prepare_split(
    source: Source,
    split: str,
    folder: Path,
    options: Options,
    workers: int,
    progress: Callable[[int, int], None],
) -> Index:
    items = source.splits[split]
    if not items:
        raise UserError(f"{source.name} has no samples in split {split}")
    plan = _plan(source.name, items, options)
    if (folder / INDEX_NAME).exists():
        _check_same(folder / INDEX_NAME, plan, "prepared")
        return read_index(folder)
    theirs = any(folder.glob("*.tar")) and not (folder / PLAN_NAME).exists()
    if theirs and not (folder / INDEX_NAME).exists():  # looked at last: another call may have just finished
        raise UserError(f"{folder}: holds tars that `prepare` did not write; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK_NAME):  # another call may be writing the same: then this one finds it done
        if (folder / INDEX_NAME).exists():
            _check_same(folder / INDEX_NAME, plan, "prepared")
            return read_index(folder)
        return _write_split(source, split, folder, options, plan, workers, progress)


def _write_split(
    source: Source,
    split: str,
    folder: Path,
    options: Options,
    plan: dict[str, object],
    workers: int,
    progress: Callable[[int, int], None],
) -> Index:
    items = source.splits[split]
    order = permutation(len(items), Purpose.SHARDS, seed=options.seed)
    parts = _cut(len(items), _planned_shards(folder / PLAN_NAME, items, options, plan))
    paths = [folder / f"{source.name}-{split}-{number:06d}.tar" for number in range(len(parts))]
    tasks = [
        _Task(path, [items[i] for i in order[part.start : part.stop]], part.start, options)
        for path, part in zip(paths, parts, strict=True)
    ]
    results: dict[Path, _Written] = {}
    done = 0
    for task, written in _run(tasks, workers):
        results[task.path] = written
        done += len(task.items)
        progress(done, len(items))
    unreadable = [line for path in paths for line in results[path].unreadable]
    shards = [results[path].shard for path in paths]
    if unreadable:
        write_text_atomically(folder / REPORT_NAME, "".join(f"{line}\n" for line in unreadable))
        if options.strict or len(unreadable) == len(items):
            raise UserError(f"{len(unreadable)} images cannot be read, the first is {unreadable[0]}")
    else:
        (folder / REPORT_NAME).unlink(missing_ok=True)  # an earlier call's
    index = write_index(folder, shards, source.classes, prepared=plan)
    (folder / PLAN_NAME).unlink()
    (folder / LOCK_NAME).unlink(missing_ok=True)
    return index


def _planned_shards(path: Path, items: Sequence[Item], options: Options, plan: dict[str, object]) -> int:
    """How many shards: once in the plan, no image that has changed since can cut the set in another way."""
    if path.exists():
        _check_same(path, plan, None)
        count = json.loads(path.read_text()).get(COUNT_KEY)
        if isinstance(count, int):
            return count
    count = _count_shards(items, options)
    write_text_atomically(path, json.dumps({**plan, COUNT_KEY: count}) + "\n")
    return count


def _plan(name: str, items: Sequence[Item], options: Options) -> dict[str, object]:
    """What decides the bytes of the shards, for comparison with what a folder holds."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(
            f"{item.name}\0{item.label}\0{item.extension}\0{item.num_bytes}\n".encode(
                errors="surrogateescape"
            )
        )
    settings = {key: value for key, value in asdict(options).items() if key != "strict"}
    return {"source": name, "samples": len(items), "items": digest.hexdigest(), **settings}


def _check_same(path: Path, plan: dict[str, object], key: str | None) -> None:
    try:
        value = json.loads(path.read_text())
        found = value.get(key) if key else value
    except (ValueError, AttributeError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: was not written by `prepare`; give another folder")
    different = [
        "other images" if name == "items" else f"{name}={found.get(name)}"
        for name in reversed(plan)
        if plan[name] != found.get(name)
    ]
    if different:
        raise UserError(
            f"{path.parent}: holds shards that were prepared with {', '.join(different)}; give another folder, or "
            "delete this one"
        )


def _count_shards(items: Sequence[Item], options: Options) -> int:
    if options.shards is not None:
        return min(options.shards, len(items))
    probes = items[:: -(-len(items) // PROBES)]
    sizes = []
    for item in probes:
        with contextlib.suppress(Exception):  # whatever cannot be read is reported when its turn comes
            sizes.append(len(_encoded(item, options)[1]))
    mean_bytes = float(np.mean(sizes)) if sizes else 0.0
    return min(len(items), max(MIN_SHARDS, round(mean_bytes * len(items) / options.shard_bytes)))


def _cut(count: int, parts: int) -> list[range]:
    bounds = np.linspace(0, count, parts + 1).round().astype(int).tolist()
    return [range(low, high) for low, high in zip(bounds[:-1], bounds[1:], strict=True)]


@dataclass(frozen=True)
class _Task:
    path: Path
    items: Sequence[Item]
    first_key: int
    options: Options


@dataclass(frozen=True)
class _Written:
    shard: Shard
    unreadable: list[str]


def _run(tasks: list[_Task], workers: int) -> Iterator[tuple[_Task, _Written]]:
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


def _write(task: _Task) -> _Written:
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
    return _Written(shard, lines)


def _reason(item: Item, options: Options) -> str | None:
    """Why an image cannot be read; None where it can."""
    try:
        _encoded(item, options)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _write_tar(task: _Task) -> None:
    from webdataset import TarWriter

    partial_path = task.path.with_name(f".{task.path.name}.partial")
    try:
        with partial_path.open("wb") as file:
            # A fixed time and owner, or the same samples would give other bytes tomorrow.
            with TarWriter(file, mtime=0, encoder=False, compress=False, user="", group="") as writer:
                for number, item in enumerate(task.items, start=task.first_key):
                    try:
                        extension, data = _encoded(item, task.options)
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


def _encoded(item: Item, options: Options) -> tuple[str, bytes]:
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

    from resnet_dist.data.pixels import resize  # needs torch, and only here

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
