"""Bundles in a folder: written aside, flushed to disk, and renamed. So each of them is whole or does not exist."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from resnet_dist.runs.storage.protocol import ALWAYS, Permit


class FolderBundles:
    """See protocol.Bundles. A bundle is used where it lies."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        with suppress(FileNotFoundError):
            return sorted(
                path.name for path in self._path.iterdir() if path.is_dir() and not path.name.startswith(".")
            )
        return []

    def location(self, name: str) -> str:
        return str(self._path / name)

    @contextmanager
    def write(self, name: str, permit: Permit = ALWAYS) -> Iterator[Path]:
        folder = self._path / name
        partial = self._path / f".{name}.{uuid.uuid4().hex[:8]}.partial"
        try:
            # Not the folder above: it was removed where it is missing, and a new one would hold nothing else of the run.
            self._path.mkdir(exist_ok=True)
            partial.mkdir()
            yield partial
            for path in [*partial.iterdir(), partial]:
                flush_to_disk(path)
            permit.check()
            _replace(folder, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        flush_to_disk(self._path)

    @contextmanager
    def fill(self) -> Iterator[Path]:
        yield self._path

    def fetch(self, name: str, only: Collection[str] | None = None) -> Path:
        folder = self._path / name
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: missing")
        return folder

    def forget(self, name: str) -> None:
        pass  # `fetch` keeps no copy.

    def remove(self, name: str) -> None:
        removed = self._path / f".{name}.{uuid.uuid4().hex[:8]}.partial"
        with suppress(FileNotFoundError):
            # Rename first: a process that is killed in between must not leave a bundle without some of its files.
            (self._path / name).rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def clean_up(self) -> None:
        """Create the folder, remove what killed writers left, and bring back a bundle that was about to be replaced."""
        self._path.mkdir(parents=True, exist_ok=True)
        self.remove_uncommitted()

    def remove_uncommitted(self) -> None:
        for replaced in self._path.glob(".*.old.partial"):
            target = self._path / replaced.name.split(".")[1]
            if not target.exists():
                replaced.rename(target)
        for partial in self._path.glob(".*.partial"):
            shutil.rmtree(partial, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _replace(folder: Path, partial: Path) -> None:
    """Rename `partial` to `folder`, which may exist: damaged, or with the same bytes from before a restart."""
    replaced = folder.with_name(f"{partial.name.removesuffix('.partial')}.old.partial")
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
