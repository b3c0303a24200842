"""TODO map."""

from __future__ import annotations

import posixpath
from pathlib import Path
from urllib.parse import urlsplit

COMMAND = "pipe:"


def is_local(url: str) -> bool:
    return not url.startswith(COMMAND) and ("://" not in url or url.startswith("file://"))


def local_path(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def compression_of(url: str) -> str | None:
    """gzip or zstd, by the name; None for a command, whose words say nothing of what it writes."""
    if url.startswith(COMMAND):
        return None
    name = (urlsplit(url).path if "://" in url else url).rstrip().lower()
    if name.endswith((".tar.gz", ".tgz")):
        return "gzip"
    return "zstd" if name.endswith((".tar.zst", ".tzst")) else None


def join(base: str, name: str) -> str:
    """`name`, relative to the folder or URL `base` unless it says where it is by itself."""
    if "://" in name or name.startswith((COMMAND, "/")):
        return name
    return posixpath.join(base, name)


def size_of(path: Path) -> int:
    """0 where its writer has renamed it meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
