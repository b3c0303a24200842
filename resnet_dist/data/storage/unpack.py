"""Compressed shards: nothing inside them can be read by offset, so each is unpacked whole.

The first bytes of a file decide how it is compressed, not its name: a gzip file named `.tar` is common.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from resnet_dist.data.storage.transfer import CHUNK_BYTES
from resnet_dist.errors import StorageError

# A tar begins with the name of its first member, which must not look like one of these: "BZh" alone could.
MAGIC = (
    (re.compile(rb"\x1f\x8b"), "gzip"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "zstd"),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), "bzip2"),
    (re.compile(rb"\xfd7zXZ\0"), "xz"),
    (re.compile(rb"\x5d\0\0(\0?[^\0])", re.DOTALL), "xz"),  # its older format, .lzma
    (re.compile(rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18"), "lz4"),  # and its older format
    (re.compile(rb"\x1f\x9d"), "compress"),
)
MAGIC_BYTES = 16
BLOCK_BYTES = 512  # one block of a tar; the last ones are zeros


def compression_of_file(path: Path) -> str | None:
    """Return how a file is compressed, by its first bytes; None for a plain one, and where there is none."""
    try:
        status = path.stat()
        return _compression(path, status.st_size, status.st_mtime_ns, status.st_ino)
    except OSError:  # reported where the file is opened to be read
        return None


@functools.lru_cache(maxsize=100_000)
def _compression(path: Path, num_bytes: int, mtime_ns: int, inode: int) -> str | None:
    with path.open("rb") as file:
        start = file.read(MAGIC_BYTES)
    return next((kind for magic, kind in MAGIC if magic.match(start)), None)


def unpack(raw: Path, target: Path, url: str, max_bytes: int) -> None:
    """Write the plain tar to `target` and flush it to disk.

    Raises StorageError where `raw` is damaged, cut off, of a format that is not read, or unpacks to more than
    `max_bytes`.
    """
    num_bytes, end = 0, b""
    with target.open("wb") as file:
        for block in _blocks(raw, url):
            num_bytes += len(block)
            if num_bytes > max_bytes:
                raise StorageError(f"{url}: unpacks to more than data.shard_cache_bytes={max_bytes:,}")
            file.write(block)
            end = (end + block)[-BLOCK_BYTES:]
        file.flush()
        # The caller renames the file next: after a crash its final name must not lack its bytes.
        os.fsync(file.fileno())
    # Check the end of the tar: the zstd reader does not report a frame that is cut off.
    if len(end) < BLOCK_BYTES or any(end):
        raise StorageError(f"{url}: cut off: what it unpacks to is no tar with an end")


def _blocks(raw: Path, url: str) -> Iterator[bytes]:
    """Yield the plain bytes. Raises StorageError where they are damaged or cut off."""
    import zstandard

    with _decompressed(raw, url) as source:
        while True:
            try:
                block = source.read(CHUNK_BYTES)
            # OSError: what gzip and bz2 raise for damage.
            except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
                raise StorageError(f"{url}: damaged or cut off: {error}") from None
            if not block:
                return
            yield block


@contextlib.contextmanager
def _decompressed(path: Path, url: str) -> Iterator[IO[bytes]]:
    kind = compression_of_file(path) or ""
    if kind not in _OPENERS:
        raise StorageError(
            f"{url}: compressed with {kind}, which is not read; compress it anew with one of {', '.join(_OPENERS)}"
        )
    with path.open("rb") as file, _OPENERS[kind](file) as plain:
        yield plain


def _open_zstd(file: IO[bytes]) -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)


_OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    "gzip": gzip.open,
    "zstd": _open_zstd,
    "bzip2": bz2.open,
    "xz": lzma.open,
}
