"""Make an index for shards that another program wrote: read each once, count its samples, compute its checksum."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from resnet_dist.data.findings import Findings
from resnet_dist.data.shards.index import PREPARED_KEY, Index, IndexMismatch, Shard, read_index, write_index
from resnet_dist.data.shards.labels import class_ids
from resnet_dist.data.shards.members import WEBDATASET, MemberRules
from resnet_dist.data.shards.names import MAX_CLASSES
from resnet_dist.data.shards.offsets import beside_index
from resnet_dist.data.shards.output import place_of_index, report_path
from resnet_dist.data.shards.scan import ScannedShard, Scanner
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.data.storage.shard_cache import ShardCache
from resnet_dist.data.storage.stored_file import check_command
from resnet_dist.data.storage.unpack import compression_of_file
from resnet_dist.data.storage.urls import compression_of, is_local, local_path, shown
from resnet_dist.errors import StorageError, UserError
from resnet_dist.system.threads import thread_pool

MAX_NAMES = 5  # classes that a message names

Progress = Callable[[int, int], None]  # (shards done, shards in all)


@dataclass(frozen=True)
class IndexOptions:
    """The options of an index, beside its class names."""

    # None: those of an index that is already there, else webdataset's.
    rules: MemberRules | None = None
    strict: bool = False  # fail where anything would be left out
    allow_empty: bool = True  # keep classes without samples, where no one named the classes


class _NewFiles:
    """The files that a scan has added, to be removed where no index is written."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._paths: list[Path] = []
        self._is_removed = False

    def add(self, path: Path) -> None:
        """Record a new file. It is removed at once where `remove` was called: an error leaves other threads at work."""
        with self._lock:
            self._paths.append(path)
            if self._is_removed:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        with self._lock:
            self._is_removed = True
            for path in self._paths:
                path.unlink(missing_ok=True)


def build_index(
    shards: Sequence[Shard],
    out: Path,
    limits: CacheLimits,
    *,
    classes: Sequence[str] | None = None,
    options: IndexOptions = IndexOptions(),
    workers: int = 4,
    progress: Progress = lambda done, total: None,
    findings: Findings | None = None,
) -> tuple[Index, Findings]:
    """Read every shard once and write an index to `out`, and an `.idx` beside each plain tar on this machine.

    classes: names, in the order of their labels; None: those of an index that is already at `out`, if they suffice,
    else "0" to the largest label found. workers: threads. findings: what was found before, in a folder of shards.
    Returns the index and an account of all samples and members. Samples without a usable image or label are left out
    of `used`; they stay in the index, and training warns of each. The account is written beside the index too.
    Raises UserError where a shard cannot be read, where no sample can be used, or, with `strict`, where anything would
    be left out; then no file stays that was not there before.
    """
    for shard in shards:
        check_command(shard.url, allowed=limits.allow_commands)
    location = place_of_index(out)
    findings = Findings() if findings is None else findings
    new_files = _NewFiles()
    try:
        before = _index_before(out)
        rules = options.rules or (before.rules if before else WEBDATASET)
        known = classes if classes is not None or before is None else before.classes
        scanned = _scan_all(shards, location, limits, rules, known, new_files, workers, progress)
        findings.add(result.findings for result in scanned)
        _check_usable(scanned, findings)
        if options.strict and findings.left_out:
            raise UserError(findings.refusal())
        named = _named_classes(scanned, classes, known)
        if named is None:
            named = _numbered_classes(scanned, allow_empty=options.allow_empty)
        indexed = [result.shard for result in scanned]
        prepared = _known_preparation(before, indexed)
        index = write_index(location, indexed, named, prepared=prepared, rules=rules)
    except BaseException:
        new_files.remove()
        with contextlib.suppress(OSError):
            beside_index(location, 0).parent.rmdir()
        raise
    findings.write(report_path(location))
    return index, findings


def _scan_all(
    shards: Sequence[Shard],
    location: Path,
    limits: CacheLimits,
    rules: MemberRules,
    known: Sequence[str] | None,
    new_files: _NewFiles,
    workers: int,
    progress: Progress,
) -> list[ScannedShard]:
    cache = ShardCache(limits, fresh=True)
    scanner = Scanner(cache, rules, class_ids(known or ()), new_files.add)
    besides = [beside_index(location, number) for number in range(len(shards))]
    scanned: list[ScannedShard] = []
    try:
        with thread_pool(workers, cache.close) as pool:
            for result in pool.map(scanner.scan, shards, besides):
                scanned.append(result)
                progress(len(scanned), len(shards))
    except StorageError as error:
        raise UserError(str(error)) from None
    finally:
        cache.close()
    return scanned


def _check_usable(scanned: Sequence[ScannedShard], findings: Findings) -> None:
    """Raise UserError where there are no samples, or none that can be used."""
    if not any(result.shard.num_samples for result in scanned):
        found = (*findings.left_out, *findings.passed_over)
        hint = f"; the first of {len(found):,} other members is {found[0].line()}" if found else ""
        raise UserError(
            f"{shown(scanned[0].shard.url)}: no samples; members must be named KEY.EXTENSION{hint}"
        )
    if not findings.used:
        first = (*findings.left_out, *findings.passed_over)[0]
        raise UserError(f"no sample has an image and a usable label; the first: {first.line()}")


def _named_classes(
    scanned: Sequence[ScannedShard], classes: Sequence[str] | None, known: Sequence[str] | None
) -> Sequence[str] | None:
    """Return the class names that a person gave, or those of the index before; None where there are none.

    Raises UserError where a label has no name. The names of the index before are then dropped, unless labels are
    words, which they alone explain.
    """
    largest = max(max(result.labels, default=-1) for result in scanned)
    if known is None or largest < len(known):
        return known
    if classes is None and not class_ids(known):
        return None
    raise UserError(f"--classes: {len(known)} names, but a label is {largest}")


def _numbered_classes(scanned: Sequence[ScannedShard], *, allow_empty: bool) -> list[str]:
    """Return "0" to the largest label. Raises UserError where there would be too many classes, or empty ones."""
    highest = max(scanned, key=lambda result: max(result.labels, default=-1))
    largest = max(highest.labels)
    if largest >= MAX_CLASSES:
        raise UserError(
            f"{shown(highest.shard.url)}: a label is {largest}, which would make as many classes; labels count "
            "from 0, or name the classes with --classes"
        )
    found = frozenset().union(*(result.labels for result in scanned))
    empty = [str(label) for label in range(largest) if label not in found]
    if empty and not allow_empty:
        more = ", …" if len(empty) > MAX_NAMES else ""
        raise UserError(
            f"no sample has the label {', '.join(empty[:MAX_NAMES])}{more}, but one has {largest}; labels count from 0. "
            "--classes says which classes there are, --allow-empty keeps classes without samples"
        )
    return [str(label) for label in range(largest + 1)]


def _index_before(out: Path) -> Index | None:
    """Return the index that will be replaced."""
    try:
        return read_index(out)
    except IndexMismatch:
        return None


def _known_preparation(before: Index | None, shards: Sequence[Shard]) -> dict[str, object] | None:
    """Return the options of `prepare` in the index that will be replaced, if `shards` are those that it wrote."""
    if before is None:
        return None
    prepared = json.loads(Path(before.location).read_text()).get(PREPARED_KEY)
    same = [replace(shard, url=shard.name) for shard in before.shards] == [
        replace(shard, url=shard.name) for shard in shards
    ]
    return prepared if same and isinstance(prepared, dict) else None


def num_compressed(shards: Sequence[Shard]) -> int:
    """Return the number of compressed shards: local ones by their bytes, others by their names."""
    return sum(
        (compression_of_file(local_path(shard.url)) if is_local(shard.url) else compression_of(shard.url))
        is not None
        for shard in shards
    )
