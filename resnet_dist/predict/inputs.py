"""The PATHS of a command line → images to read: files, folders, patterns, shards, URLs, stdin.

What is named by itself must exist, before anything is predicted. What a folder holds beside images is recorded, by the
rules of `resnet-dist prepare`.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from resnet_dist.config import Data
from resnet_dist.data.findings import Findings, one_line
from resnet_dist.data.images.formats import format_of
from resnet_dist.data.prepare.judge import read_file
from resnet_dist.data.prepare.scan import Folder, Scan, is_image_by_name
from resnet_dist.data.shards.index import INDEX_NAME, SECOND_INDEX_NAME, read_index
from resnet_dist.data.shards.listing import account_beside, has_tar_header
from resnet_dist.data.shards.names import expand
from resnet_dist.data.storage.stored_file import check_command
from resnet_dist.data.storage.transfer import has_stars, list_files, read_bytes
from resnet_dist.data.storage.urls import (
    COMMAND,
    SHARD_SUFFIXES,
    is_http,
    is_local,
    local_path,
    path_of,
    shown,
)
from resnet_dist.errors import StorageError, UserError
from resnet_dist.predict.shards import images_of_shards
from resnet_dist.predict.unread import Input

STDIN = "-"
STDIN_NAME = "stdin"


def inputs_of(paths: Iterable[str], data: Data, findings: Findings) -> Iterator[Input]:
    """Yield one input for each image that the paths name, in their order.

    findings: gets what folders and shards hold beside images. Raises UserError, before the first input, where something
    that is named does not exist or holds no image; StorageError where a shard cannot be read.
    """
    sources = [source for path in paths for source in _sources(path, data, findings)]
    for source in sources:
        yield from source


def _sources(path: str, data: Data, findings: Findings) -> Iterator[Iterable[Input]]:
    """Yield what a path stands for; only the contents of tars are not looked at yet."""
    if path == STDIN:
        yield from _of_stdin(data, findings)
    elif not is_local(path):
        yield from _of_url(path, data, findings)
    elif local_path(path).exists():
        yield _of_local(local_path(path), data, findings)
    else:
        for match in _matches(path):
            yield _of_local(match, data, findings)


def _matches(pattern: str) -> list[Path]:
    """Return what a pattern matches. Raises UserError where that is nothing, or it is none."""
    if not glob.has_magic(pattern):
        raise UserError(f"{one_line(pattern)}: no such file or folder")
    found = [Path(match) for match in sorted(glob.glob(str(local_path(pattern)), recursive=True))]
    if "**" in pattern:  # It matches a folder, and what is in it too.
        found = [path for path in found if not path.is_dir()]
    if not found:
        raise UserError(f"{one_line(pattern)}: matches no file")
    return found


def _of_stdin(data: Data, findings: Findings) -> Iterator[Iterable[Input]]:
    """Yield the image on stdin; where it is text, the paths in it, one a line (or with zeros between, as find prints)."""
    content = sys.stdin.buffer.read()
    if not content:
        raise UserError(f"{STDIN}: stdin is empty; it must be an image, or paths of images, one a line")
    if format_of(content) is not None:
        yield [Input(STDIN_NAME, lambda: content)]
        return
    text = content.decode(sys.getfilesystemencoding(), "surrogateescape")
    paths = [line for line in (text.split("\0") if "\0" in text else _lines(text)) if line]
    missing = next((path for path in paths if is_local(path) and not local_path(path).exists()), None)
    if missing is not None or STDIN in paths:
        name = one_line(missing or STDIN)
        raise UserError(f"{STDIN}: stdin is neither an image nor paths of files, one a line ({name[:80]!r})")
    for path in paths:
        yield from _sources(path, data, findings)


def _lines(text: str) -> list[str]:
    """Return the lines of a text; what Unicode calls a line separator may be in the name of a file."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def _of_local(path: Path, data: Data, findings: Findings) -> Iterable[Input]:
    return _of_folder(path, data, findings) if path.is_dir() else _of_file(path, data, findings)


def _of_file(path: Path, data: Data, findings: Findings) -> Iterable[Input]:
    if path.name.lower().endswith(SHARD_SUFFIXES) or path.suffix == ".json" or has_tar_header(path):
        return _of_shards(str(path), data, findings)
    num_bytes = path.stat().st_size if path.is_file() else None  # A pattern matches broken links too.
    # Workers of a cluster run in other folders.
    return [Input(one_line(str(path)), partial(read_file, os.path.abspath(path)), num_bytes, path)]


def _of_folder(folder: Path, data: Data, findings: Findings) -> Iterable[Input]:
    """Return the samples of a folder of shards, or the images at any depth of another folder."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"{one_line(str(folder))}: cannot be read: {error.strerror}") from None
    has_shards = any(name.lower().endswith(SHARD_SUFFIXES) for name in names)
    if has_shards or INDEX_NAME in names or SECOND_INDEX_NAME in names:
        return _of_shards(str(folder), data, findings)
    found = [
        Input(
            one_line(file.path),
            partial(read_file, os.path.abspath(file.path)),
            file.num_bytes,
            Path(file.path),
        )
        for file in Scan().files(Folder(str(folder)), findings)
    ]
    if not found:
        raise UserError(f"{one_line(str(folder))}: no images in this folder{_found(findings)}")
    return found


def _of_url(url: str, data: Data, findings: Findings) -> Iterator[Iterable[Input]]:
    name = path_of(url).lower()
    if url.startswith(COMMAND) or name.endswith((*SHARD_SUFFIXES, ".json")):
        yield _of_shards(url, data, findings)
        return
    try:
        listed = None if is_http(url) else list_files(url)
    except StorageError as error:
        raise UserError(str(error)) from None
    if listed is None:
        yield [Input(shown(url), partial(read_bytes, url))]
        return
    if any(file.lower().endswith(SHARD_SUFFIXES) for file in listed):
        yield _of_shards(url, data, findings)
        return
    if not has_stars(url):
        listed = list(_images_in(url, findings))
    if not listed:
        raise UserError(f"{shown(url)}: no {'files' if has_stars(url) else 'images'} there{_found(findings)}")
    yield [Input(shown(file), partial(read_bytes, file)) for file in listed]


def _images_in(url: str, findings: Findings) -> Iterator[str]:
    """Yield the files at any depth of a remote folder that may be images by their names; others are recorded."""
    folder = url.partition("://")[2].strip("/") + "/"
    for file in list_files(url, any_depth=True) or []:
        if is_image_by_name(file.partition(folder)[2], findings):
            yield file


def _found(findings: Findings) -> str:
    """Return what was found in place of images, for the end of a message."""
    rows = ", ".join(f"{count:,} {kind}" for _, kind, count, _ in findings.rows())
    return f" ({rows})" if rows else ""


def _of_shards(location: str, data: Data, findings: Findings) -> Iterable[Input]:
    path = local_path(location) if is_local(location) else None
    is_index = path_of(location).endswith(".json")
    if path is not None and path.is_dir():
        is_index = any((path / name).exists() for name in (INDEX_NAME, SECOND_INDEX_NAME))
    index = read_index(location) if is_index else None
    if index is not None and path is not None and path.is_dir():
        account_beside(path, {shard.name for shard in index.shards}, findings)
    shards = expand([location], findings=findings) if index is None else index.shards
    for shard in shards:  # before the first row
        check_command(shard.url, allowed=data.allow_commands)
    return images_of_shards(shards, data, findings, index)
