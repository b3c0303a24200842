"""A file by its URL, as an index records it: whether it can be read where it lies, may be fetched, and is unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from resnet_dist.data.storage.unpack import compression_of_file
from resnet_dist.data.storage.urls import COMMAND, file_name, is_local, local_path, shown
from resnet_dist.errors import UserError
from resnet_dist.system.files import checksum


@dataclass(frozen=True)
class StoredFile:
    """A file by its URL, with its size and checksum where an index records them."""

    url: str  # or a path on this machine
    num_bytes: int  # 0: unknown
    checksum: str  # ALGORITHM:HEX; empty: unknown

    @property
    def name(self) -> str:
        return file_name(self.url)


def is_plain_local(shard: StoredFile) -> bool:
    """Report whether the shard is an uncompressed file on this machine, which is read where it lies."""
    return is_local(shard.url) and compression_of_file(local_path(shard.url)) is None


def check_command(url: str, *, allowed: bool) -> None:
    """Raise UserError for a URL that would run a command in a shell, unless commands are allowed."""
    if url.startswith(COMMAND) and not allowed:
        raise UserError(
            f"{shown(url)!r} would run a command in a shell; pass --allow-commands (or set data.allow_commands=true) if "
            "you trust where it comes from"
        )


def difference(path: Path, shard: StoredFile) -> str | None:
    """Compare a file's size and checksum with the index. Returns the difference in words; None where they agree."""
    size = path.stat().st_size
    if shard.num_bytes and size != shard.num_bytes:
        return f"has {size:,} bytes, but the index records {shard.num_bytes:,}"
    algorithm, _, expected = shard.checksum.partition(":")
    if expected:
        found = checksum(path, algorithm)
        if found != shard.checksum:
            return f"has {found}, but the index records {shard.checksum}"
    return None
