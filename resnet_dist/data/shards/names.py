"""What a person names → shards and classes: brace patterns, lists, folders, indexes of others, files of names."""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from resnet_dist.data.shards.index import INDEX_NAME, Shard, shards_of
from resnet_dist.data.storage.transfer import read_bytes
from resnet_dist.data.storage.urls import COMMAND, is_local, join, local_path
from resnet_dist.errors import StorageError, UserError

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")
RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")
MAX_URLS = 1_000_000  # of one pattern: {0..999999999} is a slip of the hand


def expand(patterns: Sequence[str], split: str | None = None) -> list[Shard]:
    """Shards that a person names: brace patterns, `::` lists, folders, wids or timm indexes, in that order.

    A command (`pipe:…`) goes on to the next `::pipe:`, or to the end: its own `::` and braces are the shell's, but
    for ranges of numbers.

    What is not known of them yet is 0 or empty. Raises UserError where nothing is found.
    """
    shards = [shard for pattern in patterns for part in _parts(pattern) for shard in _expand(part, split)]
    if not shards:
        raise UserError(f"{', '.join(patterns)}: names no shards")
    url, times = Counter(shard.url for shard in shards).most_common(1)[0]
    if times > 1:
        raise UserError(f"{url}: named twice")
    return shards


def _parts(pattern: str) -> Iterator[str]:
    for piece in re.split(f"::(?={COMMAND})", pattern):
        yield from [piece] if piece.startswith(COMMAND) else piece.split("::")


def _expand(pattern: str, split: str | None) -> list[Shard]:
    if not pattern:
        raise UserError("an empty name in the list of shards")
    if pattern.startswith(COMMAND):
        return [Shard(command, 0, "", 0) for command in _expand_ranges(pattern)]
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

    _check_count(pattern)
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:  # UnbalancedBracesError
        raise UserError(f"{pattern!r}: {error}") from None


def _expand_ranges(command: str) -> list[str]:
    """`pipe:curl …/{000000..000146}.tar` → 147 commands. Other braces may be awk's, or a variable's."""
    _check_count(command)
    ends = [0, *(end for match in RANGE.finditer(command) for end in match.span()), len(command)]
    words = [command[low:high] for low, high in pairwise(ends)]  # every second one is a range
    choices = [expand_braces(word) if number % 2 else [word] for number, word in enumerate(words)]
    return ["".join(chosen) for chosen in product(*choices)]


def _check_count(pattern: str) -> None:
    """The library makes lists of whole ranges: look at their ends before it does."""
    ranges = RANGE.findall(pattern)
    if math.prod(_count(*(int(word or 1) for word in numbers)) for numbers in ranges) > MAX_URLS:
        raise UserError(f"{pattern!r} stands for more than {MAX_URLS:,} shards")


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
