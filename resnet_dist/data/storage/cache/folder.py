"""The folder of a cache: its limits, and the files of one shard in it.

These are FOLDER/ab/IDENTITY and one of the suffixes below, where IDENTITY begins with ab.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.config import Data
from resnet_dist.data.storage.stored_file import StoredFile
from resnet_dist.data.storage.urls import is_local, local_path, unsigned
from resnet_dist.system.files import expanded

TAR = ".tar"  # the shard: plain, verified, ready to be read
SUM = ".sum"  # bytes and checksum of a compressed shard as fetched; the compressed bytes are not kept
RAW = ".raw"  # fetched and verified, not yet unpacked or renamed
RAW_PARTIAL = ".raw.partial"  # being fetched
TAR_PARTIAL = ".tar.partial"  # being unpacked
LOCK = ".lock"  # held by the process that fetches the shard
COMING = ".coming"  # the number of bytes that this process has reserved


@dataclass(frozen=True)
class CacheLimits:
    """The limits of a shard cache: its folder, its bytes, its patience, and what it may run."""

    folder: Path
    max_bytes: int
    timeout_seconds: float  # without a byte of progress
    allow_commands: bool = False  # run `pipe:COMMAND` shards in a shell

    @classmethod
    def of(cls, data: Data) -> CacheLimits:
        folder = expanded(data.shard_cache)
        return cls(folder, data.shard_cache_bytes, data.fetch_timeout_seconds, data.allow_commands)


def cached_path(folder: Path, shard: StoredFile, token: str) -> Path:
    """Return the path that a shard has in the cache as a plain tar. token: of a cache that shares no files; else empty.

    It is named after the whole URL, because two sets may both have a 000000.tar, and after what is known of its content,
    so that a changed shard gets a new file. A URL that is signed anew names the same file.
    """
    known = f"{shard.checksum} {shard.num_bytes} {token}"
    if is_local(shard.url):
        with contextlib.suppress(OSError):
            status = local_path(shard.url).stat()
            known += f" {status.st_size} {status.st_mtime_ns}"
    identity = hashlib.sha256(f"{unsigned(shard.url)} {known}".encode(errors="backslashreplace")).hexdigest()[
        :24
    ]
    return folder / identity[:2] / f"{identity}{TAR}"


def mark_used(path: Path) -> bool:
    """Set the time of last use, by which shards are evicted. Returns False where the file does not exist."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
        return True
    return False
