"""Choose the implementation of a storage by its location."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from resnet_dist.errors import UserError
from resnet_dist.runs.storage.protocol import Storage
from resnet_dist.system.redact import redact

BUCKET_SCHEMES = ("s3", "gs", "az", "abfs", "abfss")


def is_url(location: str | Path) -> bool:
    """Report whether a location is that of a bucket, and not of a folder on this machine."""
    return isinstance(location, str) and "://" in location and not location.startswith("file://")


def open_storage(location: str | Path) -> Storage:
    """Return the storage at a path or URL. Raises UserError for a URL that no storage fits."""
    # Here, because a command that only asks `is_url` need not wait for them.
    if not is_url(location):
        from resnet_dist.runs.storage.folder import Folder

        return Folder(
            Path(unquote(str(location).removeprefix("file://")) if _is_file(location) else location)
        )
    text = str(location)
    scheme = text.partition("://")[0].lower()
    if scheme not in BUCKET_SCHEMES:
        raise UserError(
            f"{redact(text)}: runs cannot be kept there; give a folder, or a URL that begins with "
            f"{', '.join(f'{known}://' for known in BUCKET_SCHEMES[:3])}"
        )
    from resnet_dist.runs.storage.bucket import Bucket

    return Bucket.of(text.rstrip("/"))


def resolved(location: str | Path) -> str:
    """Return an absolute path, because ranks run in other folders, or the URL without a slash at its end."""
    return open_storage(location).location


def _is_file(location: str | Path) -> bool:
    return str(location).startswith("file://")
