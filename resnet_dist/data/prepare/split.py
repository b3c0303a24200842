"""Write the splits of a source as shuffled WebDataset shards with an index.

Which image goes into which shard follows from the source and the options alone. So processes can write shards side
by side, an interrupted call can be resumed, and the same call gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock

from resnet_dist.data.prepare.sources import Item, Source
from resnet_dist.data.prepare.write import PrepareOptions, ShardTask, WrittenShard, encode, write_shards
from resnet_dist.data.shards.index import INDEX_NAME, PREPARED_KEY, Index, read_index, write_index
from resnet_dist.errors import UserError
from resnet_dist.order.philox import Purpose, permutation
from resnet_dist.system.files import write_text_atomically

MIN_SHARDS = 8  # per split, if it has as many images: then the ranks of a small set read different files
PLAN_NAME = ".plan.json"  # in the folder of a split until its index is written
COUNT_KEY = "number_of_shards"  # in the plan
LOCK_NAME = ".lock"
REPORT_NAME = "unreadable.txt"
NUM_PROBES = 100  # images that are encoded to estimate the size of all

Progress = Callable[[int, int], None]  # (samples done, samples in all)


def prepare(
    source: Source,
    out: Path,
    options: PrepareOptions = PrepareOptions(),
    *,
    splits: Sequence[str] | None = None,
    workers: int = 1,
    progress: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> dict[str, Index]:
    """Write `splits` of `source` (None: all) to `out/SPLIT/` and return their indexes. workers: processes.

    Shards are written aside and renamed, the index last. So an interrupted call leaves no half-written file under
    a final name, the same call resumes it, and a split that is complete stays as it is. The same source and options
    give byte-identical shards. Images that cannot be read are left out and listed in `unreadable.txt`.
    `progress(split, done, total)` is called after every shard, in samples.

    Raises UserError where a folder holds something else, where no image can be read, where a file cannot be written,
    or, with `strict`, where an image cannot be read.
    """
    indexes = {}
    for split in splits or source.splits:
        if split not in source.splits:
            raise UserError(f"--split {split}: {source.name} has {', '.join(source.splits)}")
        report_progress = partial(progress, split)
        indexes[split] = _prepare_split(source, split, out / split, options, workers, report_progress)
    return indexes


def _prepare_split(
    source: Source,
    split: str,
    folder: Path,
    options: PrepareOptions,
    workers: int,
    progress: Progress,
) -> Index:
    items = source.splits[split]
    if not items:
        raise UserError(f"{source.name} has no samples in split {split}")
    plan = _plan(source.name, items, options)
    if (folder / INDEX_NAME).exists():
        _check_same(folder / INDEX_NAME, plan, PREPARED_KEY)
        return read_index(folder)
    has_other_tars = any(folder.glob("*.tar")) and not (folder / PLAN_NAME).exists()
    # Look for the index last: another call may have written it, and removed the plan, in the meantime.
    if has_other_tars and not (folder / INDEX_NAME).exists():
        raise UserError(f"{folder}: holds tars that `prepare` did not write; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    # Wait for another call that writes the same split, and then find its index.
    with FileLock(folder / LOCK_NAME):
        if (folder / INDEX_NAME).exists():
            _check_same(folder / INDEX_NAME, plan, PREPARED_KEY)
            return read_index(folder)
        return _write_split(source, split, folder, options, plan, workers, progress)


def _plan(name: str, items: Sequence[Item], options: PrepareOptions) -> dict[str, object]:
    """Return all that decides the bytes of the shards, for comparison with what a folder holds."""
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
    """Raise UserError unless the JSON file at `path` (or its value of `key`) has the values of `plan`."""
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


def _write_split(
    source: Source,
    split: str,
    folder: Path,
    options: PrepareOptions,
    plan: dict[str, object],
    workers: int,
    progress: Progress,
) -> Index:
    items = source.splits[split]
    order = permutation(len(items), Purpose.SHARDS, seed=options.seed)
    parts = _cut(len(items), _planned_shards(folder / PLAN_NAME, items, options, plan))
    paths = [folder / f"{source.name}-{split}-{number:06d}.tar" for number in range(len(parts))]
    tasks = [
        ShardTask(path, [items[i] for i in order[part.start : part.stop]], part.start, options)
        for path, part in zip(paths, parts, strict=True)
    ]
    results: dict[Path, WrittenShard] = {}
    done = 0
    for task, written in write_shards(tasks, workers):
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
        (folder / REPORT_NAME).unlink(missing_ok=True)  # of an earlier call
    index = write_index(folder, shards, source.classes, prepared=plan)
    (folder / PLAN_NAME).unlink()
    (folder / LOCK_NAME).unlink(missing_ok=True)
    return index


def _planned_shards(
    path: Path, items: Sequence[Item], options: PrepareOptions, plan: dict[str, object]
) -> int:
    """Return the number of shards and record it in the plan, so that a resumed call cuts the set the same way.

    Without the record, an image that has changed since could change the estimate.
    """
    if path.exists():
        _check_same(path, plan, None)
        count = json.loads(path.read_text()).get(COUNT_KEY)
        if isinstance(count, int):
            return count
    count = _count_shards(items, options)
    write_text_atomically(path, json.dumps({**plan, COUNT_KEY: count}) + "\n")
    return count


def _count_shards(items: Sequence[Item], options: PrepareOptions) -> int:
    """Return `options.shards`, or how many shards of about `shard_bytes` the set needs, estimated from some images."""
    if options.shards is not None:
        return min(options.shards, len(items))
    probes = items[:: -(-len(items) // NUM_PROBES)]  # evenly spread
    sizes = []
    for item in probes:
        # Skip an image that cannot be read: it is reported when its shard is written.
        with contextlib.suppress(Exception):
            sizes.append(len(encode(item, options)[1]))
    mean_bytes = float(np.mean(sizes)) if sizes else 0.0
    return min(len(items), max(MIN_SHARDS, round(mean_bytes * len(items) / options.shard_bytes)))


def _cut(num_samples: int, num_parts: int) -> list[range]:
    bounds = np.linspace(0, num_samples, num_parts + 1).round().astype(int).tolist()
    return [range(low, high) for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
