"""Compressed shards: nothing inside them can be read by offset, so each is unpacked whole."""

from __future__ import annotations

import contextlib
import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from resnet_dist.data.storage.transfer import CHUNK_BYTES
from resnet_dist.data.storage.urls import COMMAND, compression_of
from resnet_dist.errors import StorageError

MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
BLOCK_BYTES = 512  # one block of a tar; the last ones are zeros


def compression_of_fetched(path: Path, url: str) -> str | None:
    """Return "gzip" or "zstd", by the name in the URL; for the output of a command, by its first bytes."""
    if not url.startswith(COMMAND):
        return compression_of(url)
    with path.open("rb") as file:
        start = file.read(max(map(len, MAGIC)))
    return next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)


def unpack(raw: Path, target: Path, url: str, max_bytes: int) -> None:
    """Write the plain tar to `target` and flush it to disk.

    Raises StorageError where `raw` is damaged, cut off, or unpacks to more than `max_bytes`.
    """
    import zstandard

    num_bytes, end = 0, b""
    try:
        with _decompressed(raw, url) as source, target.open("wb") as file:
            while block := source.read(CHUNK_BYTES):
                num_bytes += len(block)
                if num_bytes > max_bytes:
                    raise StorageError(f"{url}: unpacks to more than data.shard_cache_bytes={max_bytes:,}")
                file.write(block)
                end = (end + block)[-BLOCK_BYTES:]
            file.flush()
            # The caller renames the file next: after a crash its final name must not lack its bytes.
            os.fsync(file.fileno())
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise StorageError(f"{url}: damaged or cut off: {error}") from None
    # Check the end of the tar: the zstd reader does not report a frame that is cut off.
    if len(end) < BLOCK_BYTES or any(end):
        raise StorageError(f"{url}: cut off: what it unpacks to is no tar with an end")


@contextlib.contextmanager
def _decompressed(path: Path, url: str) -> Iterator[IO[bytes]]:
    import zstandard

    with path.open("rb") as file:
        if compression_of_fetched(path, url) == "gzip":
            with gzip.open(file) as plain:
                yield plain  # type: ignore[misc]
        else:
            with zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as plain_zstd:
                yield plain_zstd
