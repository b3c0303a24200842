"""TODO map."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path


def write_text_atomically(path: Path, text: str) -> None:
    """Write aside, flush to disk, rename: `path` holds all of `text` or what it held before."""
    # Not by process id: containers that share a folder may have the same.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def checksum(path: Path, algorithm: str = "sha256") -> str:
    """ALGORITHM:HEX."""
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
