"""The indexes of a run: fetched once a node, and never others than it began with."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from resnet_dist.config import Data
from resnet_dist.data.shards.index import Index, IndexMismatch, Shard, read_index, write_index
from resnet_dist.data.storage import node_copy
from resnet_dist.data.storage.node_copy import FOLDER
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.system.locks import LOCK_SUFFIX
from resnet_dist.train.start import indexes
from resnet_dist.train.start.indexes import indexes_of
from tests.data.servers import FileServer, file_server

RANKS = 8
INDEX = "index.json"


def write_indexes(folder: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        shards = [Shard(str(folder / name / f"{n}.tar"), 1024, "", count) for n in range(3)]
        write_index(folder / name, shards, ("a", "b"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Serve two indexes, which a run in `tmp_path` has begun with."""
    folder = tmp_path / "served"
    write_indexes(folder, {"train": 5, "eval": 2})
    digests = tuple(read_index(folder / name).digest() for name in ("train", "eval"))
    monkeypatch.setattr(indexes, "read_run", lambda storage: SimpleNamespace(data=digests))
    with file_server(folder) as found:
        yield found


@pytest.fixture
def read(server: FileServer, tmp_path: Path) -> Callable[[], tuple[Index, Index]]:
    data = Data(
        train=f"{server.url}/train",
        eval=f"{server.url}/eval",
        shard_cache=str(tmp_path / "cache"),
        image_size=8,
        global_batch_size=8,
    )
    return lambda: indexes_of(data, open_storage(tmp_path / "run"))


def copies(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / FOLDER).glob("*.json"))


def test_the_ranks_of_a_node_fetch_each_index_once(
    server: FileServer, read: Callable[[], tuple[Index, Index]], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(RANKS) as pool:
        found = [task.result() for task in [pool.submit(read) for _ in range(RANKS)]]
    assert server.requests[INDEX] == 2
    assert {(train.num_samples, evaluation.num_samples) for train, evaluation in found} == {(15, 6)}
    assert {train.shards[0].url for train, _ in found} == {f"{server.url}/train/0.tar"}
    assert [stat.S_IMODE(path.stat().st_mode) for path in copies(tmp_path)] == [0o600, 0o600]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"shardlist": []}'])
def test_a_damaged_copy_is_not_used(
    server: FileServer, read: Callable[[], tuple[Index, Index]], tmp_path: Path, damage: bytes
) -> None:
    expected = read()
    for path in copies(tmp_path):
        path.write_bytes(damage)
    assert read() == expected
    assert copies(tmp_path) == []
    assert read() == expected
    assert len(copies(tmp_path)) == 2


def test_an_index_that_has_changed_since_the_run_began_is_refused(
    server: FileServer, read: Callable[[], tuple[Index, Index]], tmp_path: Path
) -> None:
    path = tmp_path / "served/train" / INDEX
    value = json.loads(path.read_text())
    value["shardlist"][0]["nsamples"] += 1
    path.write_text(json.dumps(value))
    with pytest.raises(IndexMismatch, match=r"/train: has changed since the run began with it"):
        read()


def test_a_cache_that_cannot_be_written_costs_one_request_a_rank(
    server: FileServer, read: Callable[[], tuple[Index, Index]], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("not a folder")
    read()
    read()
    assert server.requests[INDEX] == 4


def test_a_rank_fetches_for_itself_what_another_one_keeps_too_long(
    server: FileServer,
    read: Callable[[], tuple[Index, Index]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = read()
    for path in copies(tmp_path):
        path.unlink()
    monkeypatch.setattr(node_copy, "WAIT_SECONDS", 0.0)
    with ExitStack() as stack:
        for path in (tmp_path / "cache" / FOLDER).glob(f"*{LOCK_SUFFIX}"):
            stack.enter_context(FileLock(path))
        assert read() == expected
    assert server.requests[INDEX] == 4
    assert copies(tmp_path) == []


def test_old_copies_are_removed_and_what_cannot_be_keeps_no_new_one_away(
    read: Callable[[], tuple[Index, Index]], tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / FOLDER
    (folder / "a folder").mkdir(parents=True)
    (folder / "unused.json").write_text("{}")
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    read()
    assert len(copies(tmp_path)) == 2
    assert not (folder / "unused.json").exists()


def test_a_missing_index_is_named(
    server: FileServer, read: Callable[[], tuple[Index, Index]], tmp_path: Path
) -> None:
    (tmp_path / "served/eval" / INDEX).unlink()
    with pytest.raises(IndexMismatch, match=r"eval/index.json: no such index"):
        read()
