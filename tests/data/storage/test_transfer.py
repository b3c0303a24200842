"""Files of schemes that fsspec reads."""

from __future__ import annotations

import fsspec
import pytest

from resnet_dist.data.storage.transfer import list_files, read_bytes
from resnet_dist.errors import StorageError


class ConnectsAtOnce(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A file system that connects when it is made, as that of ftp does."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        raise ConnectionRefusedError(111, "Connection refused")


def test_a_scheme_that_cannot_connect_is_one_sentence() -> None:
    fsspec.register_implementation("refuses", ConnectsAtOnce, clobber=True)
    for call in (read_bytes, list_files):
        with pytest.raises(StorageError, match=r"^refuses://host/a\.png: .*Connection refused$"):
            call("refuses://host/a.png")
