"""Bundles in a bucket: the file that commits a bundle is uploaded last, and removed first."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from resnet_dist.runs.storage.client import Client
from resnet_dist.runs.storage.protocol import ALWAYS, Permit, Storage, StoredObject
from resnet_dist.runs.storage.scratch import explained_room, fetched_folder, written_folder
from resnet_dist.system.locks import lock_of

PART_BYTES = 8 * 2**20  # the size of a part of an upload or download; a broken one costs no more
NUM_PARTS = 8  # the parts of a file that travel at the same time
NUM_FILES = 4  # the files that are uploaded at the same time
# Objects of a bundle without its commit: an upload that broke off, if the newest of them is this old.
ORPHAN_SECONDS = 3600.0
PERMIT_SECONDS = 1.0  # for which an answer of the permit holds


class BucketBundles:
    """See protocol.Bundles. What is uploaded and fetched passes through the scratch folder of this machine."""

    def __init__(self, bucket: Storage, client: Client, prefix: str, commit: str) -> None:
        self._bucket, self._client, self._prefix, self._commit = bucket, client, prefix, commit

    def names(self) -> list[str]:
        return sorted(name for name, group in self._groups().items() if self._is_committed(group))

    def location(self, name: str) -> str:
        return f"{self._bucket.location}/{name}"

    @contextmanager
    def write(self, name: str, permit: Permit = ALWAYS) -> Iterator[Path]:
        with written_folder() as folder:
            yield folder
            self._publish(folder, name, permit)

    @contextmanager
    def fill(self) -> Iterator[Path]:
        with written_folder() as folder:
            yield folder
            for path in sorted(folder.iterdir()):
                if (path / self._commit).exists():
                    self._publish(path, path.name, ALWAYS)

    def fetch(self, name: str, only: Collection[str] | None = None) -> Path:
        folder = self._fetched(name)
        with FileLock(lock_of(folder)), explained_room():
            commit = self._bucket.read(f"{name}/{self._commit}")
            if commit is None:
                raise FileNotFoundError(f"{self.location(name)}: missing")
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / self._commit).exists() or (folder / self._commit).read_bytes() != commit:
                shutil.rmtree(folder)
                folder.mkdir()
            for found in self._bucket.objects(name):
                target = folder / found.name.removeprefix(f"{name}/")
                if target.name == self._commit or (only is not None and target.name not in only):
                    continue
                if not target.exists() or target.stat().st_size != found.num_bytes:
                    self._download(found, target)
            (folder / self._commit).write_bytes(commit)
            os.utime(folder)
        return folder

    def forget(self, name: str) -> None:
        folder = self._fetched(name)
        with FileLock(lock_of(folder)):
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self, name: str) -> None:
        self._bucket.delete(f"{name}/{self._commit}")
        self._bucket.at(name).delete_all()

    def clean_up(self) -> None:
        for name, newest in self._uncommitted():
            # Wait with the removal: another process may be uploading them.
            if time.time() - newest > ORPHAN_SECONDS:
                self._bucket.at(name).delete_all()

    def remove_uncommitted(self) -> None:
        for name, _ in self._uncommitted():
            self._bucket.at(name).delete_all()

    def _uncommitted(self) -> Iterator[tuple[str, float]]:
        """Yield the names under which objects lie without their commit, and the time of the newest of these objects."""
        for name, group in self._groups().items():
            if not self._is_committed(group):
                yield name, max(found.modified for found in group)

    def _groups(self) -> dict[str, list[StoredObject]]:
        """Return the objects by the bundle that they belong to."""
        groups: dict[str, list[StoredObject]] = {}
        for found in self._bucket.objects():
            name, slash, _ = found.name.partition("/")
            if slash:
                groups.setdefault(name, []).append(found)
        return groups

    def _is_committed(self, group: list[StoredObject]) -> bool:
        return any(found.name.partition("/")[2] == self._commit for found in group)

    def _fetched(self, name: str) -> Path:
        identity = hashlib.sha256(self._bucket.location.encode()).hexdigest()[:16]
        return fetched_folder(identity, name)

    def _publish(self, folder: Path, name: str, permit: Permit) -> None:

        def put(path: Path) -> None:
            # A process that was stopped may continue when the files are another one's.
            permit.check(PERMIT_SECONDS)
            self._upload(path, f"{name}/{path.name}")

        permit.check()
        # Remove the commit of a bundle that is replaced: it must not vouch for the files of two.
        self._bucket.delete(f"{name}/{self._commit}")
        files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        with ThreadPoolExecutor(NUM_FILES) as pool:
            others = [path for path in files if path.name != self._commit]
            list(pool.map(put, others))
        permit.check()
        # With the short limits of a small request: it must not arrive when the permit has long run out.
        self._bucket.write(f"{name}/{self._commit}", (folder / self._commit).read_bytes())

    def _upload(self, path: Path, name: str) -> None:
        put = self._client.library.put
        self._client.call(
            put,
            f"{self._prefix}/{name}".strip("/"),
            path,
            large=True,
            chunk_size=PART_BYTES,
            max_concurrency=NUM_PARTS,
        )

    def _download(self, found: StoredObject, target: Path) -> None:
        """Fetch an object in parallel parts; it appears under its name when it is whole."""
        partial = target.with_name(f".{target.name}.partial")
        key = f"{self._prefix}/{found.name}".strip("/")

        def fetch_part(start: int) -> None:
            length = min(PART_BYTES, found.num_bytes - start)
            part: Any = self._client.call(
                self._client.library.get_range, key, large=True, start=start, length=length
            )
            os.pwrite(file.fileno(), part, start)

        with partial.open("wb") as file, ThreadPoolExecutor(NUM_PARTS) as pool:
            list(pool.map(fetch_part, range(0, found.num_bytes, PART_BYTES)))
        partial.replace(target)
