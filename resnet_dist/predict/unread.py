"""An image that is named, but not read yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Input:
    """An image that is not read yet. `read` may raise OSError or ValueError."""

    name: str  # on one line, without a password
    read: Callable[[], bytes]
    num_bytes: int | None = None  # None: unknown
    path: Path | None = None  # of an image that is a file of its own on this machine
    read_anywhere: Callable[[], bytes] | None = None  # in another process; None: `read` can be sent there

    def portable(self) -> Input:
        """Return the input as another process can read it, which sees the same files and buckets."""
        return (
            self if self.read_anywhere is None else replace(self, read=self.read_anywhere, read_anywhere=None)
        )
