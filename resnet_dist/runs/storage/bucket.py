"""A bucket of an object store: s3://, gs://, az://. Objects appear whole; creating and replacing have conditions."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from resnet_dist.errors import StorageError, UserError
from resnet_dist.runs.storage.bucket_bundles import BucketBundles
from resnet_dist.runs.storage.client import Client, client_of, root_of
from resnet_dist.runs.storage.logs import SegmentLog
from resnet_dist.runs.storage.protocol import StoredObject, Unreachable, Versioned
from resnet_dist.runs.storage.scratch import log_folder

POLL_SECONDS = 1.0  # each look is a request, which costs money and time
NO_BUCKET = "there is no such bucket; create it, or check the name and AWS_ENDPOINT_URL"


class Bucket:
    """The Storage of everything below a URL. See protocol.Storage."""

    poll_seconds = POLL_SECONDS

    def __init__(self, client: Client, prefix: str) -> None:
        self._client, self._prefix, self._obs = client, prefix, client.library

    @classmethod
    def of(cls, url: str) -> Bucket:
        root, prefix = root_of(url)
        return cls(client_of(root), prefix)

    @property
    def location(self) -> str:
        return f"{self._client.url}/{self._prefix}".rstrip("/")

    def check(self, *folders: str) -> None:
        """Write, list and remove an object: so a lack of permissions, or of conditions, is found at once."""
        name, content = f".check-{uuid.uuid4().hex}", uuid.uuid4().hex.encode()
        try:
            self._client.meet()
            self.create(name, content)
            conditions = not self.create(name, content + b" again")
            self.folders()
            self.delete(name)
        except StorageError as error:
            raise UserError(str(error)) from None
        if not conditions:
            raise UserError(
                f"{self.location}: the store ignores conditions (If-None-Match), so two processes could train one run; use "
                "a store that supports them, such as S3, GCS, Azure, R2, Ceph or MinIO of 2024 or later"
            )

    def is_gone(self) -> bool:
        return False

    def local_folder(self) -> Path:
        return log_folder(hashlib.sha256(self.location.encode()).hexdigest()[:16])

    def at(self, name: str) -> Bucket:
        return Bucket(self._client, self._key(name))

    def read(self, name: str) -> bytes | None:
        found = self.read_version(name)
        return None if found is None else found.content

    def read_version(self, name: str) -> Versioned | None:
        def get(store: Any, key: str) -> Versioned:
            result = self._obs.get(store, key)
            return Versioned(bytes(result.bytes()), _version(result.meta))

        try:
            return self._client.call(get, self._key(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self._put(name, content)

    def create(self, name: str, content: bytes) -> bool:
        errors = self._obs.exceptions
        try:
            self._put(name, content, mode="create")
        except (errors.AlreadyExistsError, errors.PreconditionError):
            return self.read(name) == content  # Ours, where only the answer of an earlier try was lost.
        except Unreachable:
            if self.read(name) != content:
                raise
        return True

    def replace(self, name: str, content: bytes, version: str) -> str | None:
        errors = self._obs.exceptions
        try:
            return _version(self._put(name, content, mode=json.loads(version)))
        except (errors.AlreadyExistsError, errors.PreconditionError, FileNotFoundError, Unreachable) as error:
            found = self.read_version(name)
            if found is not None and found.content == content:
                return found.version  # Ours: only the answer of an earlier try was lost.
            if isinstance(error, Unreachable):
                raise
            return None

    def modified(self, name: str) -> float | None:
        try:
            meta = self._client.call(self._obs.head, self._key(name))
        except FileNotFoundError:
            return None
        return float(meta["last_modified"].timestamp())

    def objects(self, prefix: str = "") -> list[StoredObject]:
        def collect(store: Any, key: str) -> list[Any]:
            return list(self._obs.list(store, key).collect())

        try:
            found = self._client.call(collect, self._key(prefix), large=True)
        except FileNotFoundError:
            raise self._no_bucket() from None
        start = len(self._prefix) + 1 if self._prefix else 0
        return sorted(
            (
                StoredObject(meta["path"][start:], meta["size"], meta["last_modified"].timestamp())
                for meta in found
            ),
            key=lambda one: one.name,
        )

    def folders(self) -> list[str]:
        try:
            found = self._client.call(self._obs.list_with_delimiter, self._prefix or None)
        except FileNotFoundError:
            raise self._no_bucket() from None
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])

    def delete(self, *names: str) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                self._client.call(self._obs.delete, self._key(name))

    def delete_all(self) -> None:
        self.delete(*(found.name for found in self.objects()))

    @contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        yield False

    def log(self, name: str) -> SegmentLog:
        return SegmentLog(self, name)

    def bundles(self, commit: str) -> BucketBundles:
        return BucketBundles(self, self._client, self._prefix, commit)

    def _put(self, name: str, content: bytes, **options: Any) -> Any:
        """Return what the store answers: the object's new version."""
        try:
            return self._client.call(self._obs.put, self._key(name), content, use_multipart=False, **options)
        except FileNotFoundError:
            if isinstance(options.get("mode"), dict):
                raise  # the object is missing
            raise self._no_bucket() from None

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}".strip("/")

    def _no_bucket(self) -> StorageError:
        return StorageError(f"{self.location}: {NO_BUCKET}")


def _version(meta: Any) -> str:
    return json.dumps({key: meta[key] for key in ("e_tag", "version") if meta.get(key) is not None})
