"""The byte limit of the shard cache holds while shards are on their way, and a dead process keeps no share of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from filelock import FileLock

from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import read_index
from resnet_dist.data.shards.names import expand
from resnet_dist.data.storage.cache import fetch as fetch_module
from resnet_dist.data.storage.cache import quota as quota_module
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.data.storage.cache.quota import Quota
from resnet_dist.data.storage.shard_cache import ShardCache
from resnet_dist.errors import StorageError
from tests.data.conftest import write_shards
from tests.data.servers import file_server


@pytest.fixture
def quota(tmp_path: Path) -> Quota:
    (tmp_path / "ab").mkdir()
    return Quota(tmp_path, 100)


def tar(quota: Quota, name: str) -> Path:
    return quota.folder / "ab" / f"{name}.tar"


def lock(path: Path) -> FileLock:
    return FileLock(path.with_suffix(".lock"))


def reserved(quota: Quota, path: Path, num_bytes: int, *, seconds: float = 60, closed: bool = False) -> None:
    event = threading.Event()
    if closed:
        event.set()
    with quota.reserved(path, num_bytes, url=path.name, timeout_seconds=seconds, closed=event):
        assert path.with_suffix(".coming").read_text() == str(num_bytes)
    assert not path.with_suffix(".coming").exists()


def test_a_file_on_its_way_takes_its_room(quota: Quota) -> None:
    first, second = tar(quota, "first"), tar(quota, "second")
    with lock(first), lock(second):
        assert quota._reserve(first, 60)
        assert not quota._reserve(second, 60)
        assert quota._reserve(second, 40)
        assert not quota._reserve(second, 41)
    with lock(second):  # the process of the first one has died: its lock is free
        assert quota._reserve(second, 60)
    assert not first.with_suffix(".coming").exists()


def test_what_has_come_is_not_counted_twice(quota: Quota) -> None:
    first, second = tar(quota, "first"), tar(quota, "second")
    with lock(first), lock(second):
        assert quota._reserve(first, 60)
        first.with_suffix(".raw.partial").write_bytes(bytes(50))
        assert quota._reserve(second, 40)
        second.with_suffix(".raw.partial").write_bytes(bytes(40))
        assert quota._reserve(second, 40)  # it resumes


def test_shards_give_way_and_what_dead_processes_left_too(quota: Quota) -> None:
    old, left, new = tar(quota, "old"), tar(quota, "left"), tar(quota, "new")
    old.write_bytes(bytes(40))
    for suffix in (".idx", ".sum"):
        old.with_suffix(suffix).write_bytes(b"x")
    left.with_suffix(".raw.partial").write_bytes(bytes(50))
    with lock(new):
        with lock(left):
            assert quota._reserve(new, 50)
            assert not old.exists()
            assert not old.with_suffix(".idx").exists()
            assert not old.with_suffix(".sum").exists()
            assert left.with_suffix(".raw.partial").exists()
        assert quota._reserve(new, 90)
    assert not left.with_suffix(".raw.partial").exists()


class Waited(threading.Event):
    """An event that reports when a thread begins to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.begun.set()
        return super().wait(timeout)


def test_waiting_ends_when_room_is_given_back(quota: Quota) -> None:
    first, second, closed = tar(quota, "first"), tar(quota, "second"), Waited()
    done = threading.Event()

    def fetch() -> None:
        with lock(second), quota.reserved(second, 60, url="", timeout_seconds=60, closed=closed):
            done.set()

    with lock(first):
        assert quota._reserve(first, 60)
        thread = threading.Thread(target=fetch)
        thread.start()
        assert closed.begun.wait(30)
        assert not done.is_set()
    thread.join(timeout=30)
    assert done.is_set()


def test_nothing_is_dropped_in_vain(quota: Quota) -> None:
    kept, first, second = tar(quota, "kept"), tar(quota, "first"), tar(quota, "second")
    kept.write_bytes(bytes(30))
    with lock(first), lock(second):
        assert quota._reserve(first, 60)
        assert not quota._reserve(second, 50)
        assert kept.exists()
        assert quota._reserve(second, 40)
        assert not kept.exists()


def test_waiting_ends_with_an_error(quota: Quota, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota_module, "POLL_SECONDS", 0.01)
    first, second = tar(quota, "first"), tar(quota, "second")
    with lock(first):
        assert quota._reserve(first, 60)
        with pytest.raises(StorageError, match="second.tar: given up"):
            reserved(quota, second, 60, closed=True)
        with pytest.raises(StorageError, match="shard_cache_bytes=100 are taken by other shards"):
            reserved(quota, second, 60, seconds=0.05)
    with pytest.raises(
        StorageError, match="second.tar: its 101 bytes are larger than data.shard_cache_bytes=100"
    ):
        reserved(quota, second, 101)


@pytest.mark.parametrize("seen_before_it_is_renamed", [False, True])
def test_a_shard_that_is_renamed_while_one_counts_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, seen_before_it_is_renamed: bool
) -> None:
    """One of two files is renamed to its next name in each glob; the other is complete from the start."""
    names = ["a.raw.partial", "a.raw", "a.tar"]
    (tmp_path / "00").mkdir()
    (tmp_path / "00/b.tar").write_bytes(bytes(1000))
    glob = Path.glob

    def looked(self: Path, pattern: str) -> Iterator[Path]:
        found = sorted(glob(self, pattern))
        if seen_before_it_is_renamed:
            yield from found
        for before, after in pairwise(names):
            if (self / "00" / before).exists():
                (self / "00" / before).rename(self / "00" / after)
                break
        if not seen_before_it_is_renamed:
            yield from found

    monkeypatch.setattr(Path, "glob", looked)
    for name in names:
        (tmp_path / "00" / name).write_bytes(bytes(100))
        assert sorted(size for _, size, _ in Quota(tmp_path, 10_000)._files()) == [100, 1000]
        (tmp_path / "00/a.tar").unlink()


def test_shards_fetched_side_by_side_stay_within_the_limit(
    tmp_path: Path, limits: CacheLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "served"
    build_index(expand(write_shards(folder, (40, 41, 42, 43, 44, 45, 46, 47))), folder, limits)
    sizes = sorted(path.stat().st_size for path in folder.glob("*.tar"))
    max_bytes = sizes[-1] + sizes[-2]
    count, guard, totals = 0, threading.Lock(), []
    fetch: Callable[..., None] = fetch_module.fetch_file

    def watched(url: str, partial: Path, *, num_bytes: int, **options: object) -> None:
        """Record the bytes in the cache plus those on their way in any thread."""
        nonlocal count
        with guard:
            count += num_bytes
            totals.append(count + sum(path.stat().st_size for path in limits.folder.rglob("*.tar")))
        fetch(url, partial, num_bytes=num_bytes, **options)
        with guard:
            count -= num_bytes

    monkeypatch.setattr(fetch_module, "fetch_file", watched)
    with file_server(folder) as server:
        shards = read_index(server.url).shards
        cache = ShardCache(replace(limits, max_bytes=max_bytes))
        cache.want(shards)
        for shard in shards:
            fd, _ = cache.open(shard)
            os.close(fd)
        cache.close()
    assert len(totals) >= 8
    assert max(totals) <= max_bytes
    assert not list(limits.folder.rglob("*.coming"))
