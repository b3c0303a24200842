"""URLs of shards: a path, `file://…`, a scheme of fsspec (https, s3, gs, hf …), or `pipe:COMMAND`.

Everything here follows from the text of the URL; nothing is opened.
"""

from __future__ import annotations

import posixpath
from pathlib import Path
from urllib.parse import urlsplit

COMMAND = "pipe:"
# Compression by the ending of a file's name; what the bytes of a file say comes first.
COMPRESSED_SUFFIXES = {
    ".tar.gz": "gzip",
    ".tgz": "gzip",
    ".tar.zst": "zstd",
    ".tzst": "zstd",
    ".tar.bz2": "bzip2",
    ".tbz2": "bzip2",
    ".tbz": "bzip2",
    ".tar.xz": "xz",
    ".txz": "xz",
    ".tar.lzma": "xz",
    ".tar.lz4": "lz4",
}
SHARD_SUFFIXES = (".tar", *COMPRESSED_SUFFIXES)  # in any mixture of capitals
IDX_SUFFIX = ".idx"  # replaces `.tar` in the name of the DALI index beside a tar


def is_local(url: str) -> bool:
    return not url.startswith(COMMAND) and ("://" not in url or url.startswith("file://"))


def local_path(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def compression_of(url: str) -> str | None:
    """Return the compression by the file name; None for a plain tar and for a command, whose output is unknown."""
    if url.startswith(COMMAND):
        return None
    name = (urlsplit(url).path if "://" in url else url).rstrip().lower()
    return next((kind for suffix, kind in COMPRESSED_SUFFIXES.items() if name.endswith(suffix)), None)


def join(base: str, name: str) -> str:
    """Return `name` relative to the folder or URL `base`; a URL, a command or an absolute path stays as it is."""
    if "://" in name or name.startswith((COMMAND, "/")):
        return name
    return posixpath.join(base, name)
