"""Arguments of the command line → shards and class names: brace patterns, lists, folders, wids and timm indexes."""

from __future__ import annotations

import codecs
import glob
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from resnet_dist.data.findings import Findings
from resnet_dist.data.shards.index import Shard, read_index, shards_of
from resnet_dist.data.shards.listing import shards_in
from resnet_dist.data.storage.transfer import list_files, read_bytes
from resnet_dist.data.storage.urls import (
    COMMAND,
    SHARD_SUFFIXES,
    folder_of,
    is_http,
    is_local,
    join,
    local_path,
    path_of,
    shown,
)
from resnet_dist.errors import StorageError, UserError

RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")
MAX_CLASSES = 1_000_000  # without names; a larger label is an identifier, a time stamp, or damage
MAX_URLS = 1_000_000  # per pattern; more is a typing error, such as {0..999999999}


def expand(
    patterns: Sequence[str], split: str | None = None, findings: Findings | None = None
) -> list[Shard]:
    """Return the shards that `patterns` name, in that order: brace patterns, `::` lists, folders, wids or timm indexes.

    A command (`pipe:…`) ends at the next `::pipe:` or at the end of its pattern. Inside it, only ranges of numbers
    are expanded; `::` and other braces belong to the shell. split: which one of a timm index. findings: gets the files
    of folders that are no shards.

    Sizes, checksums and counts that are not known yet are 0 or empty. Raises UserError where no shard is found, or
    one is named twice.
    """
    findings = Findings() if findings is None else findings
    parts = [part for pattern in patterns for part in _parts(pattern)]
    shards = [shard for part in parts for shard in _expand(part, split, findings)]
    if not shards:
        raise UserError(f"{', '.join(map(shown, patterns))}: names no shards")
    url, times = Counter(shard.url for shard in shards).most_common(1)[0]
    if times > 1:
        raise UserError(f"{shown(url)}: named twice")
    return shards


def _parts(pattern: str) -> Iterator[str]:
    for piece in re.split(f"::(?={COMMAND})", pattern):
        yield from [piece] if piece.startswith(COMMAND) else piece.split("::")


def _expand(pattern: str, split: str | None, findings: Findings) -> list[Shard]:
    if not pattern:
        raise UserError("an empty name in the list of shards")
    if split is not None and not path_of(pattern).endswith(".json"):
        raise UserError(f"--split {split}: {shown(pattern)} has no splits, which timm's _info.json has")
    if pattern.startswith(COMMAND):
        return [Shard(command, 0, "", 0) for command in _expand_ranges(pattern)]
    if path_of(pattern).endswith(".json"):
        return _from_index(pattern, split)
    if is_local(pattern) and local_path(pattern).is_dir():
        return [Shard(str(path), 0, "", 0) for path in shards_in(local_path(pattern).absolute(), findings)]
    # A file whose own name has braces or stars needs no expansion.
    is_file = is_local(pattern) and local_path(pattern).is_file()
    urls = [pattern] if is_file else expand_braces(pattern)
    return [Shard(file, 0, "", 0) for url in urls for file in _expand_stars(url)]


def _expand_stars(url: str) -> list[str]:
    """Return the files that `*.tar` or a remote folder names, sorted; any other URL as it is. Raises UserError."""
    if is_local(url):
        path = local_path(url).absolute()
        if not glob.has_magic(str(path)) or path.is_file():
            return [str(path)]
        found = sorted(name for name in glob.glob(str(path)) if Path(name).is_file())
        if not found:
            raise UserError(f"{url}: matches no file")
        return found
    has_stars = "*" in path_of(url)
    if is_http(url):
        if has_stars or url.endswith("/"):
            raise UserError(
                f"{shown(url)}: a web server cannot list its files; name the shards with braces, such as "
                "train-{000000..000146}.tar"
            )
        return [url]
    if not has_stars and path_of(url).lower().endswith(SHARD_SUFFIXES):
        return [url]
    try:
        listed = list_files(url)
    except StorageError as error:
        raise UserError(str(error)) from None
    if listed is None:
        return [url]
    names = listed if has_stars else [name for name in listed if name.lower().endswith(SHARD_SUFFIXES)]
    if not names:
        raise UserError(f"{shown(url)}: {'matches no file' if has_stars else 'no shards in this folder'}")
    return names


def expand_braces(pattern: str) -> list[str]:
    """Expand `train-{000000..000146}.tar` to 147 names, as webdataset does. Raises UserError."""
    import braceexpand

    _check_count(pattern)
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:  # UnbalancedBracesError
        raise UserError(f"{pattern!r}: {error}") from None


def _expand_ranges(command: str) -> list[str]:
    """Expand `pipe:curl …/{000000..000146}.tar` to 147 commands. Other braces stay: they belong to the shell or awk."""
    _check_count(command)
    ends = [0, *(end for match in RANGE.finditer(command) for end in match.span()), len(command)]
    pieces = [command[low:high] for low, high in pairwise(ends)]  # text and ranges in turn
    choices = [expand_braces(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in product(*choices)]


def _check_count(pattern: str) -> None:
    """Raise UserError for more than MAX_URLS names. Check first, because braceexpand lists a whole range in memory."""
    ranges = RANGE.findall(pattern)
    if math.prod(_count(*(int(number or 1) for number in numbers)) for numbers in ranges) > MAX_URLS:
        raise UserError(f"{pattern!r} names more than {MAX_URLS:,} shards")


def _count(first: int, last: int, step: int) -> int:
    """Return how many numbers are in `{first..last..step}`; braceexpand takes a step of 0 for 1."""
    return abs(last - first) // max(1, abs(step)) + 1


def _absolute(url: str) -> str:
    return str(local_path(url).absolute()) if is_local(url) else url


def _from_index(location: str, split: str | None) -> list[Shard]:
    """Return the shards of a wids index, or of timm's `_info.json`. Raises UserError."""
    base = folder_of(_absolute(location))
    try:
        value = json.loads(read_bytes(location))
        if "splits" in value:
            shards = list(_timm_shards(value["splits"], base, location, split))
        elif split is not None:
            raise UserError(f"--split {split}: {shown(location)} has no splits, which timm's _info.json has")
        else:
            shards = list(shards_of(value, base))
    except FileNotFoundError:
        raise UserError(f"{shown(location)}: no such index") from None
    except StorageError as error:
        raise UserError(str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{shown(location)}: neither a wids index nor timm's ({type(error).__name__}: {error})"
        ) from None
    if not is_local(location):
        _refuse_paths(shards, location)
    return shards


def _refuse_paths(shards: Sequence[Shard], location: str) -> None:
    """Raise UserError where a remote index names a path on this machine.

    `.idx` files are written beside local shards, and a remote index must not choose where this machine writes.
    """
    for shard in shards:
        if is_local(shard.url):
            raise UserError(
                f"{shown(location)}: names {shard.url}, a path on this machine; an index that lies elsewhere must name its "
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
    """Return class names by label: from a number of classes, a file with one name per line, or an index; None for None.

    Raises UserError where `text` is none of these, or a line is empty.
    """
    if text is None:
        return None
    if text.isdecimal() and text.strip("0"):
        # Count the digits first: Python reads no number of thousands of them.
        if len(text) > len(str(MAX_CLASSES)) or int(text) > MAX_CLASSES:
            raise UserError(f"--classes {text[:40]}: an index has at most {MAX_CLASSES:,} classes")
        return [str(label) for label in range(int(text))]
    if text.endswith(".json") or "://" in text or Path(text).is_dir():
        return list(read_index(text).classes)
    try:
        content = Path(text).read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        names = re.split(r"\r\n|\r|\n", content.decode("utf-16" if is_utf16 else "utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--classes {text}: neither a number of classes, nor a file of names, nor an index ({error})"
        ) from None
    while names and not names[-1].strip():
        names.pop()
    if not names or any(not name.strip() for name in names):
        raise UserError(f"--classes {text}: must have one name on each line, and no empty line")
    return [name.strip() for name in names]


def default_location(shards: Sequence[Shard]) -> Path | None:
    """Return the folder of all shards, for an index beside them; None unless all lie in one folder on this machine."""
    folders = {local_path(s.url).parent for s in shards if is_local(s.url)}
    if len(folders) == 1 and all(is_local(s.url) for s in shards):
        return folders.pop()
    return None
