"""Write the splits of a source as shuffled WebDataset shards with an index.

Which image goes into which shard follows from the source and the options alone. So processes can write shards side
by side, an interrupted call can be resumed, and the same call gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock

from resnet_dist.config.data.reading import MAX_PIXELS
from resnet_dist.data.findings import MAX_NAMES, REPORT_NAME, Findings, one_line
from resnet_dist.data.prepare.items import SHARED, Item, Source
from resnet_dist.data.prepare.output import LOCK_NAME, PLAN_NAME, check_output, is_complete, remove_unfinished
from resnet_dist.data.prepare.seekable import check_program
from resnet_dist.data.prepare.write import PrepareOptions, ShardTask, WrittenShard, encode, write_shards
from resnet_dist.data.shards.index import INDEX_NAME, PREPARED_KEY, Index, read_index, write_index
from resnet_dist.errors import ExplainedError, UserError
from resnet_dist.order.philox import Purpose, permutation
from resnet_dist.system.files import write_text_atomically

MIN_SHARDS = 8  # per split, if it has as many images: then the ranks of a small set read different files
COUNT_KEY = "number_of_shards"  # in the plan
# Options that are not recorded with these values: earlier versions had no others.
_DEFAULTS: dict[str, object] = {"max_pixels": MAX_PIXELS, "seekable": False}
NUM_PROBES = 100  # images that are encoded to estimate the size of all

Progress = Callable[[int, int], None]  # (samples done, samples in all)


@dataclass(frozen=True)
class Prepared:
    """A split on disk."""

    index: Index
    findings: Findings  # the split's; in the first that is prepared, the whole source's too
    report: Path  # lists the findings; missing where there are none


@dataclass(frozen=True)
class _SplitJob:
    """A split to be written."""

    source: Source
    split: str
    folder: Path
    options: PrepareOptions
    findings: Findings  # those of the scan
    workers: int
    progress: Progress

    @property
    def items(self) -> Sequence[Item]:
        return self.source.splits[self.split]


def prepare(
    source: Source,
    out: Path,
    options: PrepareOptions = PrepareOptions(),
    *,
    splits: Sequence[str] | None = None,
    workers: int = 1,
    progress: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> dict[str, Index]:
    """Write `splits` of `source` and return their indexes; see `prepare_splits`."""
    prepared = prepare_splits(source, out, options, splits=splits, workers=workers, progress=progress)
    return {split: done.index for split, done in prepared.items()}


def prepare_splits(
    source: Source,
    out: Path,
    options: PrepareOptions = PrepareOptions(),
    *,
    splits: Sequence[str] | None = None,
    workers: int = 1,
    progress: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> dict[str, Prepared]:
    """Write `splits` of `source` (None: all) to `out/SPLIT/`. workers: processes.

    Shards are written aside and renamed, the index last. So an interrupted call leaves no half-written file under
    a final name, the same call resumes it, and a split that is complete stays as it is. The same source and options
    give byte-identical shards. What is left out or passed over is listed in REPORT_NAME in the split's folder.
    `progress(split, done, total)` is called after every shard, in samples.

    Raises UserError where a folder holds something else, where no image can be read, or none of a class, where a
    file cannot be written, or, with `strict`, where anything would be left out.
    """
    chosen = list(splits or source.splits)
    for split in chosen:
        if split not in source.splits:
            raise UserError(f"--split {split}: {source.name} has {', '.join(source.splits)}")
    check_output(out, chosen)
    # Not for what is complete: it is reported as that, or refused as something else, and nothing is written.
    if options.seekable and any(not is_complete(out / split) for split in chosen):
        check_program()
    jobs = []
    for number, split in enumerate(chosen):
        findings = Findings()
        findings.add(
            source.findings[key] for key in (SHARED,) * (number == 0) + (split,) if key in source.findings
        )
        report_progress = partial(progress, split)
        jobs.append(_SplitJob(source, split, out / split, options, findings, workers, report_progress))
    # Check all before any is written.
    scanned = Findings()
    scanned.add(job.findings for job in jobs)
    if options.strict and scanned.left_out:
        raise UserError(scanned.refusal())
    for job in jobs:
        if not job.items:
            raise UserError(
                f"{source.name} has no samples in split {job.split}"
                + ("; no class has two images, so none can be held out" if job.split == "eval" else "")
            )
    return {job.split: _prepare_split(job) for job in jobs}


def _prepare_split(job: _SplitJob) -> Prepared:
    folder = job.folder
    plan = _plan(job.source.name, job.items, job.options)
    if is_complete(folder):
        return _complete(job, plan)
    has_other_tars = any(folder.glob("*.tar")) and not (folder / PLAN_NAME).exists()
    # Look for the index last: another call may have written it, and removed the plan, in the meantime.
    if has_other_tars and not is_complete(folder):
        raise UserError(f"{folder}: holds tars that `prepare` did not write; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Wait for another call that writes the same split, and then find its index.
        with FileLock(folder / LOCK_NAME):
            if is_complete(folder):
                return _complete(job, plan)
            return _write_split(job, plan)
    except OSError as error:
        if isinstance(error, ExplainedError):
            raise
        raise UserError(
            f"{one_line(str(folder))}: could not be written ({error}); repeat the same call to resume"
        ) from None


def _complete(job: _SplitJob, plan: dict[str, object]) -> Prepared:
    """Return a split that an earlier call has written, with what that call left out. Raises UserError."""
    _check_same(job.folder / INDEX_NAME, plan, PREPARED_KEY)
    index = read_index(job.folder)
    if len(index.classes) != len(job.source.classes):
        raise UserError(
            f"{job.folder}: holds shards that were prepared with {len(index.classes)} classes, but {job.source.name} has "
            f"{len(job.source.classes)}; give another folder, or delete this one"
        )
    report = job.folder / REPORT_NAME
    findings = Findings.read(report)
    lost = len(job.items) - index.num_samples
    if lost and not findings.left_out:
        findings.leave_out(f"{job.folder}/", "images that an earlier call could not read", "", lost)
    if not report.exists():  # Nothing was left out then, or an earlier version did not count it.
        findings.add([job.findings])
        with contextlib.suppress(OSError):  # A complete set may be in a folder that can only be read.
            findings.write(report)
    findings.used = index.num_samples
    if job.options.strict and findings.left_out:
        raise UserError(f"{job.folder}: was prepared without --strict; {findings.refusal()}")
    return Prepared(index, findings, report)


def _plan(name: str, items: Sequence[Item], options: PrepareOptions) -> dict[str, object]:
    """Return all that decides the bytes of the shards, for comparison with what a folder holds."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(
            f"{item.name}\0{item.label}\0{item.extension}\0{item.num_bytes}\n".encode(
                errors="surrogateescape"
            )
        )
    settings = {key: value for key, value in asdict(options).items() if key not in ("strict", "allow_empty")}
    settings = {key: value for key, value in settings.items() if (key, value) not in _DEFAULTS.items()}
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
    plan, found = _DEFAULTS | plan, _DEFAULTS | found
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


def _write_split(job: _SplitJob, plan: dict[str, object]) -> Prepared:
    items, folder = job.items, job.folder
    order = permutation(len(items), Purpose.SHARDS, seed=job.options.seed)
    parts = _cut(len(items), _planned_shards(folder / PLAN_NAME, items, job.options, plan))
    paths = [folder / f"{job.source.name}-{job.split}-{number:06d}.tar" for number in range(len(parts))]
    tasks = [
        ShardTask(path, [items[i] for i in order[part.start : part.stop]], part.start, job.options)
        for path, part in zip(paths, parts, strict=True)
    ]
    results: dict[Path, WrittenShard] = {}
    done = 0
    for task, written in write_shards(tasks, job.workers):
        results[task.path] = written
        done += len(task.items)
        job.progress(done, len(items))
    left_out = sorted(
        (int(order[task.first_key + position]), kind, detail)
        for task in tasks
        for position, kind, detail in results[task.path].left_out
    )
    findings = Findings()
    findings.add([job.findings])
    prefix = job.source.folders.get(job.split, "")
    for number, kind, detail in left_out:
        findings.leave_out(prefix + items[number].name, kind, detail)
    _check_left_out(job, findings, {number for number, _, _ in left_out})
    for number, kind in sorted(
        (int(order[task.first_key + position]), kind)
        for task in tasks
        for position, kind in results[task.path].unchanged
    ):
        findings.keep_unchanged(prefix + items[number].name, kind)
    findings.write(folder / REPORT_NAME)
    index = write_index(folder, [results[path].shard for path in paths], job.source.classes, prepared=plan)
    findings.used = index.num_samples
    (folder / PLAN_NAME).unlink()
    (folder / LOCK_NAME).unlink(missing_ok=True)
    return Prepared(index, findings, folder / REPORT_NAME)


def _check_left_out(job: _SplitJob, findings: Findings, left_out: set[int]) -> None:
    """Raise UserError where images were left out and that is not allowed. left_out: their numbers in the split."""
    if job.options.strict and findings.left_out:
        remove_unfinished(job.folder)
        raise UserError(findings.refusal())
    if len(left_out) == len(job.items):
        remove_unfinished(job.folder)
        job.folder.mkdir(parents=True, exist_ok=True)
        findings.write(job.folder / REPORT_NAME)
        first = findings.left_out[-len(left_out)]
        raise UserError(
            f"{one_line(job.source.name)}: none of the {len(left_out):,} images of split {job.split} can be read, the first is "
            f"{first.line()}; {one_line(str(job.folder / REPORT_NAME))} lists them all"
        )
    # A class that has nothing held out is still trained: its images are left out, which is all that is said.
    held_out = job.split == "eval" and len(job.source.splits) > 1 and not job.source.folders
    if not left_out or held_out or job.options.allow_empty:
        return
    labels = {job.items[number].label for number in left_out}
    labels -= {item.label for number, item in enumerate(job.items) if number not in left_out}
    if labels:
        findings.write(job.folder / REPORT_NAME)
        names = [repr(job.source.classes[label]) for label in sorted(labels)]
        more = ", …" if len(names) > MAX_NAMES else ""
        raise UserError(
            f"{one_line(job.source.name)}: no image of {len(names)} of its classes can be read in split {job.split}: "
            f"{one_line(', '.join(names[:MAX_NAMES]))}{more}; {one_line(str(job.folder / REPORT_NAME))} lists them. "
            f"Mend them and delete {one_line(str(job.folder))}, or pass --allow-empty to keep the classes"
        )


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
