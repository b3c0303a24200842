"""The files beside an index: no secrets that others can read, and none left after an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.data.shards.build import _NewFiles
from resnet_dist.data.shards.index import Shard, write_index


@pytest.mark.parametrize(
    ("url", "mode"),
    [
        ("ftp://me:hush@h/a.tar", 0o600),
        ("pipe:curl -u me:hush https://h/a.tar", 0o600),
        ("https://h/a.tar?Signature=hush", 0o600),
        ("https://me:hush@h/a.tar", 0o644),  # written without user and password
        ("https://h/a.tar?path=b", 0o644),
        ("s3://bucket/a.tar", 0o644),
    ],
)
def test_only_its_owner_reads_an_index_with_a_secret(tmp_path: Path, url: str, mode: int) -> None:
    write_index(tmp_path, [Shard(url, 1, "", 1)], ["a"])
    found = (tmp_path / "index.json").stat().st_mode & 0o777
    assert (found & 0o044 == 0) == (mode == 0o600)


def test_a_file_that_a_thread_adds_after_the_error_is_removed_too(tmp_path: Path) -> None:
    early, late, files = tmp_path / "early.idx", tmp_path / "late.idx", _NewFiles()
    early.touch()
    files.add(early)
    files.remove()
    late.touch()
    files.add(late)
    assert list(tmp_path.iterdir()) == []
