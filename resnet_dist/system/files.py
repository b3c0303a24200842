"""Expand `~` in a path; write a file atomically; compute a checksum; recognize a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """Return the path with the home folder in place of `~`. One of an unknown user stays: pathlib raises RuntimeError."""
    return Path(os.path.expanduser(path))


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8, as `write_bytes_atomically` does."""
    write_bytes_atomically(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes_atomically(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Write `content` to a file beside `path`, flush it to disk and rename it.

    `path` then holds all of it; after a failure it holds what it held before. mode: who may read it; None: as usual.
    """
    # A process id would not be unique: containers that share a folder may use the same one.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def checksum(path: Path, algorithm: str = "sha256") -> str:
    """Return the checksum of a file as `ALGORITHM:HEX`."""
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def is_disk_full(error: BaseException) -> bool:
    """Report whether an error states that a disk, or a quota on it, is full. Some libraries have it as a text alone."""
    is_own = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return is_own or os.strerror(errno.ENOSPC) in str(error)
