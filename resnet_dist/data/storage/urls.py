"""URLs of shards: a path, `file://…`, a scheme of fsspec (https, s3, gs, hf …), or `pipe:COMMAND`.

Everything here follows from the text of the URL; nothing is opened.
"""

from __future__ import annotations

import posixpath
from pathlib import Path
from urllib.parse import urlsplit

COMMAND = "pipe:"
GZIP_SUFFIXES = (".tar.gz", ".tgz")
ZSTD_SUFFIXES = (".tar.zst", ".tzst")
SHARD_SUFFIXES = (".tar", *GZIP_SUFFIXES, *ZSTD_SUFFIXES)
IDX_SUFFIX = ".idx"  # replaces `.tar` in the name of the DALI index beside a tar


def is_local(url: str) -> bool:
    return not url.startswith(COMMAND) and ("://" not in url or url.startswith("file://"))


def local_path(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def compression_of(url: str) -> str | None:
    """Return "gzip" or "zstd" by the file name; None for a plain tar and for a command, whose output is unknown."""
    if url.startswith(COMMAND):
        return None
    name = (urlsplit(url).path if "://" in url else url).rstrip().lower()
    if name.endswith(GZIP_SUFFIXES):
        return "gzip"
    return "zstd" if name.endswith(ZSTD_SUFFIXES) else None


def join(base: str, name: str) -> str:
    """Return `name` relative to the folder or URL `base`; a URL, a command or an absolute path stays as it is."""
    if "://" in name or name.startswith((COMMAND, "/")):
        return name
    return posixpath.join(base, name)
