"""One suite for every storage: a folder, and a bucket."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from resnet_dist.runs.storage import bucket_bundles, folder, folder_bundles
from resnet_dist.runs.storage.bucket_bundles import BucketBundles
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Bundles, Storage
from resnet_dist.runs.storage.scratch import scratch_folder
from resnet_dist.system.locks import lock_of

COMMIT = "commit.json"


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(tmp_path / "output")
    return open_storage(f"s3://{request.getfixturevalue('s3').new_bucket()}/some/prefix")


def test_objects(storage: Storage) -> None:
    storage.check()
    assert storage.read("run.json") is None
    assert storage.modified("run.json") is None
    storage.write("run.json", b"one")
    storage.write("run.json", b"two")
    assert storage.read("run.json") == b"two"
    assert abs((storage.modified("run.json") or 0) - time.time()) < 600
    storage.write("deep/er/x y+z#.bin", bytes(range(256)))
    below = storage.at("deep")
    assert below.read("er/x y+z#.bin") == bytes(range(256))
    assert [(found.name, found.num_bytes) for found in below.objects()] == [("er/x y+z#.bin", 256)]
    assert [found.name for found in storage.objects()] == ["deep/er/x y+z#.bin", "run.json"]
    assert [found.name for found in storage.objects("deep")] == ["deep/er/x y+z#.bin"]
    assert storage.folders() == ["deep"]
    assert open_storage(storage.location).read("run.json") == b"two"
    assert below.location == f"{storage.location}/deep"
    storage.delete("run.json", "missing")
    assert storage.read("run.json") is None
    storage.at("deep").delete_all()
    assert storage.objects() == []
    assert storage.folders() == []


def test_a_place_without_anything(storage: Storage) -> None:
    place = storage.at("none")
    assert place.read("x") is None
    assert place.read_version("x") is None
    assert place.objects() == []
    assert place.folders() == []
    assert place.bundles(COMMIT).names() == []
    place.bundles(COMMIT).clean_up()
    place.delete_all()


def race(number: int, act: Callable[[int], object]) -> list[object]:
    """Call `act` in as many threads at once; return the results."""
    start = threading.Barrier(number)

    def run(index: int) -> object:
        start.wait()
        return act(index)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


def test_one_of_many_creates(storage: Storage) -> None:
    results = race(8, lambda index: storage.create("lease", str(index).encode()))
    assert sorted(map(bool, results)) == [False] * 7 + [True]
    assert storage.read("lease") == str(results.index(True)).encode()
    assert storage.create("lease", str(results.index(True)).encode())  # The answer was lost.


def test_one_of_many_replaces(storage: Storage) -> None:
    storage.write("lease", b"old")
    found = storage.read_version("lease")
    assert found is not None
    assert found.content == b"old"
    results = race(8, lambda index: storage.replace("lease", str(index).encode(), found.version))
    versions = [version for version in results if version is not None]
    assert len(versions) == 1
    assert storage.read("lease") == str(results.index(versions[0])).encode()
    again = storage.replace("lease", b"again", str(versions[0]))
    assert again is not None
    assert storage.replace("lease", b"third", str(versions[0])) is None
    assert storage.read("lease") == b"again"
    storage.delete("lease")
    assert storage.replace("lease", b"fourth", again) is None
    assert storage.read("lease") is None


def test_a_log_is_followed_while_it_grows(storage: Storage) -> None:
    log = storage.log("spool.jsonl")
    assert log.read() == (b"", log.read()[1])
    writer = log.open()
    data, position = log.read()
    assert data == b""
    for part in (b"1\n", b"2\n3\n"):
        writer.write(part)
        writer.flush()
        data, position = log.read(position)
        assert data == part
    assert log.read(position) == (b"", position)
    assert log.end() == position
    writer.write(b"4\n")
    writer.close()
    assert log.read() == (b"1\n2\n3\n4\n", log.end())
    writer = log.open()  # the writer of another attempt
    writer.write(b"5\n")
    writer.close()
    assert log.read(position)[0] == b"4\n5\n"


def test_lines_are_seen_without_a_flush(storage: Storage) -> None:
    log = storage.log("spool.jsonl")
    writer = log.open()
    writer.write(b"1\n")
    deadline = time.monotonic() + 60
    while not log.read()[0]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    writer.close()


def write(bundles: Bundles, name: str, *, size: int = 3, text: str = "x") -> None:
    with bundles.write(name) as made:
        (made / "model.bin").write_bytes(text.encode() * size)
        (made / "empty.bin").write_bytes(b"")
        (made / COMMIT).write_text(json.dumps({"text": text}))


def test_bundles(storage: Storage) -> None:
    bundles = storage.at("checkpoints").bundles(COMMIT)
    bundles.clean_up()
    write(bundles, "step-2")
    write(bundles, "step-1")
    assert bundles.names() == ["step-1", "step-2"]
    fetched = bundles.fetch("step-2")
    assert sorted(path.name for path in fetched.iterdir()) == [COMMIT, "empty.bin", "model.bin"]
    assert (fetched / "model.bin").read_text() == "xxx"
    assert fetched.name == "step-2"
    assert bundles.location("step-2") == f"{storage.location}/checkpoints/step-2"
    write(bundles, "step-2", text="new")
    assert (bundles.fetch("step-2") / "model.bin").read_text() == "newnewnew"
    bundles.remove("step-1")
    bundles.remove("step-1")
    assert bundles.names() == ["step-2"]
    with pytest.raises(FileNotFoundError, match="step-1: missing"):
        bundles.fetch("step-1")
    assert {found.name.split("/")[1] for found in storage.objects()} == {"step-2"}


def test_no_bundle_makes_a_folder_anew_that_was_removed(tmp_path: Path) -> None:
    bundles = open_storage(tmp_path / "run/checkpoints").bundles(COMMIT)
    bundles.clean_up()
    write(bundles, "step-1")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        write(bundles, "step-2")
    assert list(tmp_path.iterdir()) == []


def test_large_files_travel_in_parts(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_bundles, "PART_BYTES", 5 * 2**20)  # the smallest that S3 takes
    content = bytes(range(256)) * (12 * 2**20 // 256) + b"end"
    bundles = storage.bundles(COMMIT)
    with bundles.write("a") as made:
        (made / "model.bin").write_bytes(content)
        (made / COMMIT).write_text("{}")
    assert (bundles.fetch("a") / "model.bin").read_bytes() == content


def test_a_bundle_that_was_not_finished_is_none(storage: Storage, tmp_path: Path) -> None:
    bundles = storage.at("checkpoints").bundles(COMMIT)
    bundles.clean_up()
    write(bundles, "step-1")
    with pytest.raises(KeyboardInterrupt), bundles.write("step-2") as made:  # noqa: PT012
        (made / "model.bin").write_bytes(b"half")
        raise KeyboardInterrupt
    assert bundles.names() == ["step-1"]
    assert {found.name.split("/")[1] for found in storage.objects()} == {"step-1"}
    leftovers = [
        path for path in tmp_path.rglob("*") if path.name.endswith(".partial") or path.name == "model.bin"
    ]
    assert all(path.parent.name == "step-1" for path in leftovers)


def test_only_what_is_needed_is_fetched(storage: Storage) -> None:
    bundles = storage.bundles(COMMIT)
    write(bundles, "a")
    assert (bundles.fetch("a", only=["model.bin"]) / "model.bin").exists()
    assert (bundles.fetch("a", only=["model.bin"]) / COMMIT).exists()
    assert (bundles.fetch("a") / "empty.bin").exists()


def test_the_processes_of_a_node_share_a_download(s3) -> None:  # type: ignore[no-untyped-def]
    bundles = open_storage(f"s3://{s3.new_bucket()}/x").bundles(COMMIT)
    write(bundles, "a")
    requests: list[str] = []

    def count(method: str, path: str) -> None:
        if method == "GET" and path.endswith("model.bin"):
            requests.append(path)

    s3.proxy.fault = count
    assert len(set(race(4, lambda index: bundles.fetch("a")))) == 1
    assert len(requests) == 1
    bundles.forget("a")
    bundles.fetch("a")
    assert len(requests) == 2


def test_scratch_stays_small(s3, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from resnet_dist.runs.storage import scratch

    bundles = open_storage(f"s3://{s3.new_bucket()}/x").bundles(COMMIT)
    monkeypatch.setattr(scratch, "RECENT_SECONDS", -1.0)
    dead = scratch_folder() / "writing/dead"
    dead.mkdir(parents=True)
    lock_of(dead).touch()
    for name in ("a", "b", "c"):
        write(bundles, name)
        bundles.fetch(name)
    assert not dead.exists()
    folders = [path for path in scratch_folder().glob("*/*/*") if path.is_dir()]
    assert [path.name for path in folders] == ["c"]
    assert [path for path in (scratch_folder() / "writing").iterdir() if path.is_dir()] == []


def test_orphans_of_broken_uploads_are_removed_after_an_hour(s3, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    storage = open_storage(f"s3://{s3.new_bucket()}/x")
    bundles = storage.bundles(COMMIT)
    write(bundles, "whole")
    storage.write("broken/model.bin", b"half")
    bundles.clean_up()
    assert storage.read("broken/model.bin") == b"half"  # it may be on its way
    now = time.time()
    monkeypatch.setattr(bucket_bundles.time, "time", lambda: now + bucket_bundles.ORPHAN_SECONDS + 60)
    bundles.clean_up()
    assert storage.read("broken/model.bin") is None
    assert bundles.names() == ["whole"]


def test_what_no_bundle_holds_goes_at_once_when_nobody_writes(storage: Storage) -> None:
    place = storage.at("checkpoints")
    bundles = place.bundles(COMMIT)
    bundles.remove_uncommitted()
    assert storage.folders() == []  # A folder that was moved away is not made anew.
    bundles.clean_up()
    write(bundles, "whole")
    # As a process leaves them that is killed while it writes: aside in a folder, without the commit in a bucket.
    unfinished = "broken" if isinstance(bundles, BucketBundles) else ".broken.0.partial"
    place.write(f"{unfinished}/model.bin", b"half")
    bundles.remove_uncommitted()
    assert bundles.names() == ["whole"]
    assert {found.name.split("/")[0] for found in place.objects()} == {"whole"}
    assert place.read(f"{unfinished}/model.bin") is None


def test_what_killed_writers_leave_in_a_folder_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundles = open_storage(tmp_path).bundles(COMMIT)
    write(bundles, "a", text="old")
    rename, calls = Path.rename, []

    def rename_once(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_once)
        patch.setattr(folder_bundles.shutil, "rmtree", lambda *arguments, **options: None)
        with pytest.raises(KeyboardInterrupt):
            write(bundles, "a", text="new")
    assert bundles.names() == []
    bundles.clean_up()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (bundles.fetch("a") / "model.bin").read_text() == "oldoldold"


def test_a_process_that_died_while_it_replaced_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path)
    storage.write("lease", b"1")
    found = storage.read_version("lease")
    assert found is not None
    (tmp_path / ".lease.replacing").touch()
    monkeypatch.setattr(folder, "GUARD_SECONDS", 0.1)
    assert storage.replace("lease", b"2", found.version) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lease"]
