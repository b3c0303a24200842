"""Make an index for shards that something else wrote, and verify one against what the shards hold."""

from __future__ import annotations

import contextlib
import json
import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resnet_dist.config import UserError
from resnet_dist.data.decode import open_image, whole
from resnet_dist.data.index import (
    INDEX_NAME,
    Index,
    IndexMismatch,
    Shard,
    idx_path,
    index_location,
    read_index,
    shards_of,
    write_index,
)
from resnet_dist.data.remote import StorageError, compression_of, is_local, join, local_path, read_bytes
from resnet_dist.data.shards import BadSample, ShardReader, check_label, parse_label
from resnet_dist.data.storage import Limits, Storage, check_command, checksum, difference, lies_here
from resnet_dist.data.tar import TarError, find_image, find_label, group_samples, write_idx

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")
MOST_CLASSES = 1_000_000  # without names for them: a label beyond is an id, a time, or damage
MOST_URLS = 1_000_000  # of one pattern: {0..999999999} is a slip of the hand

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """What reading one shard brought."""

    shard: Shard
    largest_label: int
    problems: list[str] = field(default_factory=list)  # samples without a usable image or label


def expand(patterns: Sequence[str], split: str | None = None) -> list[Shard]:
    """Shards that a person names: brace patterns, `::` lists, folders, wids or timm indexes, in that order.

    What is not known of them yet is 0 or empty. Raises UserError where nothing is found.
    """
    shards = [shard for pattern in patterns for part in pattern.split("::") for shard in _expand(part, split)]
    if not shards:
        raise UserError(f"{', '.join(patterns)}: names no shards")
    url, times = Counter(shard.url for shard in shards).most_common(1)[0]
    if times > 1:
        raise UserError(f"{url}: named twice")
    return shards


def _expand(pattern: str, split: str | None) -> list[Shard]:
    if not pattern:
        raise UserError("an empty name in the list of shards")
    if pattern.startswith("pipe:"):
        return [Shard(pattern, 0, "", 0)]
    if pattern.endswith(".json"):
        return _from_index(pattern, split)
    if is_local(pattern) and local_path(pattern).is_dir():
        names = sorted(p for p in local_path(pattern).iterdir() if p.name.endswith(SHARD_SUFFIXES))
        if not names:
            raise UserError(f"{pattern}: no shards in this folder; expected {', '.join(SHARD_SUFFIXES)}")
        return [Shard(str(path.absolute()), 0, "", 0) for path in names]
    return [Shard(_absolute(url), 0, "", 0) for url in expand_braces(pattern)]


def expand_braces(pattern: str) -> list[str]:
    """`train-{000000..000146}.tar` → 147 names, as webdataset expands them."""
    import braceexpand

    # The library makes lists of whole ranges: look at their ends before it does.
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}", pattern)
    if math.prod(_count(*(int(word or 1) for word in numbers)) for numbers in ranges) > MOST_URLS:
        raise UserError(f"{pattern!r} stands for more than {MOST_URLS:,} shards")
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:  # UnbalancedBracesError
        raise UserError(f"{pattern!r}: {error}") from None


def _count(first: int, last: int, step: int) -> int:
    """Numbers in `{first..last..step}`; a step of 0 is one of 1 there."""
    return abs(last - first) // max(1, abs(step)) + 1


def _absolute(url: str) -> str:
    return str(local_path(url).expanduser().absolute()) if is_local(url) else url


def _from_index(location: str, split: str | None) -> list[Shard]:
    """Shards of a wids index, or of timm's `_info.json`."""
    base = posixpath.dirname(_absolute(location))
    try:
        value = json.loads(read_bytes(location))
        if "splits" in value:
            shards = list(_timm_shards(value["splits"], base, location, split))
        else:
            shards = list(shards_of(value, base))
    except FileNotFoundError:
        raise UserError(f"{location}: no such index") from None
    except StorageError as error:
        raise UserError(str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{location}: neither a wids index nor timm's ({type(error).__name__}: {error})"
        ) from None
    if not is_local(location):
        _refuse_paths(shards, location)
    return shards


def _refuse_paths(shards: Sequence[Shard], location: str) -> None:
    """An `.idx` is written beside a shard that lies here: where, is not for somebody elsewhere to say."""
    for shard in shards:
        if is_local(shard.url):
            raise UserError(
                f"{location}: names {shard.url}, a path on this machine; an index that lies elsewhere must name its "
                "shards by URL, or relative to itself"
            )


def _timm_shards(splits: dict[str, Any], base: str, location: str, split: str | None) -> Iterator[Shard]:
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise UserError(f"{location}: has splits {', '.join(splits)}; name one with --split")
    entry = splits[split]
    for name, count in zip(entry["filenames"], entry["shard_lengths"], strict=True):
        yield Shard(join(base, str(name)), 0, "", int(count))


def build_index(
    shards: Sequence[Shard],
    out: Path,
    limits: Limits,
    *,
    classes: Sequence[str] | None = None,
    workers: int = 4,
    progress: Progress = lambda done, total: None,
) -> tuple[Index, list[str]]:
    """Read every shard once and write an index to `out`, with an `.idx` beside tars that are here.

    classes: names, in the order of their labels; None: "0" to the largest label found. The second value lists
    samples that have no image or no label; they are counted, and each costs a warning in training.
    Raises UserError naming the shard where one cannot be read, and writes no index then.
    """
    for shard in shards:
        check_command(shard.url, allowed=limits.allow_commands)
    storage = Storage(limits, fresh=True)
    found: list[Found] = []
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                for result in pool.map(lambda shard: read_shard(shard, storage), shards):
                    found.append(result)
                    progress(len(found), len(shards))
            finally:
                pool.shutdown(cancel_futures=True)
    except StorageError as error:
        raise UserError(str(error)) from None
    finally:
        storage.close()
    if not any(result.shard.num_samples for result in found):
        raise UserError(f"{shards[0].url}: no samples; members must be named KEY.EXTENSION")
    result = max(found, key=lambda result: result.largest_label)
    largest = result.largest_label
    if classes is None:
        classes = _known_classes(out, largest)
    if classes is None and largest >= MOST_CLASSES:
        raise UserError(
            f"{result.shard.url}: a label is {largest}, which would make as many classes; labels count from 0, or "
            "say --classes"
        )
    if classes is None:
        classes = [str(label) for label in range(largest + 1)]
    if largest >= len(classes):
        raise UserError(f"--classes: {len(classes)} names, but a label is {largest}")
    now = [result.shard for result in found]
    index = write_index(out, now, classes, prepared=_known_preparation(out, now))
    return index, [problem for result in found for problem in result.problems]


def _known_classes(out: Path, largest: int) -> list[str] | None:
    """Names that the index had which is written anew, where they still suffice."""
    try:
        names = list(read_index(out).classes)
    except IndexMismatch:
        return None
    return names if len(names) > largest else None


def _known_preparation(out: Path, shards: Sequence[Shard]) -> dict[str, object] | None:
    """What `prepare` noted in the index that is written anew, while these are the shards that it wrote."""
    try:
        noted = json.loads(Path(index_location(out)).read_text()).get("prepared")
        before = read_index(out).shards
    except (OSError, ValueError, AttributeError):  # no index, or none of ours
        return None
    same = [replace(shard, url=shard.name) for shard in before] == [
        replace(shard, url=shard.name) for shard in shards
    ]
    return noted if same and isinstance(noted, dict) else None


def read_shard(shard: Shard, storage: Storage) -> Found:
    """Count and checksum a shard, and write its `.idx` where it lies here. Raises TarError, StorageError."""
    fd, path = storage.open(shard)
    with os.fdopen(fd, "rb") as file:
        samples = list(group_samples(file, shard.url))
        if shard.num_samples and shard.num_samples != len(samples):
            raise TarError(
                f"{shard.url}: has {len(samples)} samples, but the index that named it says {shard.num_samples}"
            )
        largest, problems = -1, []
        for members in samples:
            image, label = find_image(members), find_label(members)
            key = f"{shard.name}/{members[0].key}"
            if image is None or label is None:
                problems.append(f"{key}: has no {'label (.cls or .json)' if image else 'image'}")
                continue
            try:
                text = os.pread(file.fileno(), label.size, label.offset)
                number = parse_label(text, is_json=label.extension != "cls")
                if number < 0:
                    raise ValueError(f"label {number} is negative")
                largest = max(largest, number)
            except ValueError as error:
                problems.append(f"{key}: {error}")
    if lies_here(shard):
        with contextlib.suppress(OSError):  # a folder that is only read: offsets are found when it is opened
            write_idx(idx_path(path), samples)
    known = _measured(shard, path, storage)
    storage.forget(shard)
    return Found(replace(known, num_samples=len(samples)), largest, problems)


def _measured(shard: Shard, path: Path, storage: Storage) -> Shard:
    """With size and checksum, of the file as it is stored."""
    if is_local(shard.url):
        path = local_path(shard.url)
    elif compression_of(shard.url):
        fetched = storage.fetched_checksum(shard)  # the compressed bytes themselves are gone
        return Shard(shard.url, *fetched, shard.num_samples) if fetched else shard
    problem = difference(path, shard)
    if problem:
        raise TarError(f"{shard.url}: {problem}")
    return Shard(shard.url, path.stat().st_size, checksum(path), shard.num_samples)


def verify_index(
    location: str, limits: Limits, *, workers: int = 4, progress: Progress = lambda done, total: None
) -> list[str]:
    """Recompute every checksum and decode every image. Returns what is wrong, each with shard and key."""
    index = read_index(location)
    reader, storage = ShardReader(index, limits), Storage(limits)
    problems: list[str] = []
    first_ids = [sum(index.counts[:number]) for number in range(len(index.shards))]

    def check(number: int) -> list[str]:
        shard = index.shards[number]
        try:
            if is_local(shard.url):
                problem = difference(local_path(shard.url), shard)
                if problem:
                    return [f"{shard.url}: {problem}"]
            storage.path(shard)  # what is fetched is compared when it comes
            ids = range(first_ids[number], first_ids[number] + shard.num_samples)
            return [text for text in (_problem(reader, i, len(index.classes)) for i in ids) if text]
        except (OSError, IndexMismatch) as error:
            return [f"{shard.url}: {error}"]

    try:
        with ThreadPoolExecutor(workers) as pool:
            for done, found in enumerate(pool.map(check, range(len(index.shards))), start=1):
                problems += found
                progress(done, len(index.shards))
    finally:
        reader.close()
        storage.close()
    return problems


def _problem(reader: ShardReader, sample_id: int, num_classes: int) -> str | None:
    try:
        sample = reader.read(sample_id)
        check_label(sample.label, num_classes)
        whole(open_image(sample.image, 3))
    except UserError:
        raise
    except (BadSample, ValueError) as problem:
        return f"{reader.key(sample_id)}: {problem}"
    return None


def compressed(shards: Sequence[Shard]) -> int:
    return sum(compression_of(shard.url) is not None for shard in shards)


def class_names(text: str | None) -> list[str] | None:
    """From a number of classes, or a file with a name on each line. Raises UserError."""
    if text is None:
        return None
    if text.isdecimal() and int(text) > 0:
        return [str(label) for label in range(int(text))]
    try:
        names = Path(text).read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--classes {text}: neither a number of classes nor a file of names ({error})"
        ) from None
    while names and not names[-1].strip():
        names.pop()
    if not names or any(not name.strip() for name in names):
        raise UserError(f"--classes {text}: must have one name on each line, and no empty line")
    return [name.strip() for name in names]


def default_location(shards: Sequence[Shard]) -> Path | None:
    """The folder that holds all of them, where they lie in one on this machine."""
    folders = {local_path(s.url).parent for s in shards if is_local(s.url)}
    if len(folders) == 1 and all(is_local(s.url) for s in shards):
        return folders.pop() / INDEX_NAME
    return None
