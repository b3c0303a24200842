"""Objects in S3: obstore reads them in one request, and fsspec whatever obstore does not read."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from resnet_dist.data.storage import retry, s3, transfer
from resnet_dist.data.storage.s3 import S3Bucket, stream_of
from resnet_dist.data.storage.transfer import fetch_file
from resnet_dist.errors import StorageError
from tests.benchmarks.bucket_server import Line, handler_of
from tests.data.servers import LOCALHOST
from tests.s3_server import FaultyStore, variables

CONTENT = bytes(range(256)) * 400  # 25 chunks
CHUNK_BYTES = 4096
URL = "s3://shards/set/a%41 b#c.tar"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """Serve a bucket with one object at URL, behind a proxy."""
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
    pytest.importorskip("obstore", reason="needs obstore")
    path = tmp_path / "served" / URL.removeprefix("s3://")
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    server = ThreadingHTTPServer((LOCALHOST, 0), handler_of(tmp_path / "served", Line(None), 0.0))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    proxy = FaultyStore(server.server_port)
    for name, value in variables(proxy.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(transfer, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()  # another test had another port
    yield proxy
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.close()
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(folder: Path, num_bytes: int = len(CONTENT), begun: int = 0) -> bytes:
    partial = folder / "partial"
    partial.write_bytes(CONTENT[:begun])
    fetch_file(URL, partial, num_bytes=num_bytes, timeout_seconds=20.0)
    return partial.read_bytes()


@pytest.mark.parametrize("begun", [0, 1, CHUNK_BYTES, len(CONTENT) - 1])
def test_an_object_is_read_by_one_request(bucket: FaultyStore, tmp_path: Path, begun: int) -> None:
    assert fetched(tmp_path, begun=begun) == CONTENT
    assert bucket.requests == {"GET": 1}


def test_a_transfer_that_breaks_off_keeps_what_has_come(bucket: FaultyStore, tmp_path: Path) -> None:
    faults = iter(["cut answer", "500", None, "cut answer", "503"])
    bucket.fault = lambda method, path: next(faults, None)
    assert fetched(tmp_path) == CONTENT
    assert bucket.seen["cut answer"] == 2
    assert bucket.requests["GET"] < len(CONTENT) // CHUNK_BYTES


def test_a_server_that_stalls_is_asked_again(
    bucket: FaultyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.1)
    faults = iter(["slow"])
    bucket.fault = lambda method, path: next(faults, None)
    assert fetched(tmp_path) == CONTENT
    assert bucket.seen["slow"] == 1
    assert bucket.requests["GET"] == 2


def test_fsspec_reads_what_obstore_cannot(
    bucket: FaultyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[str] = []

    async def fail(self: S3Bucket, key: str, start: int, block_bytes: int) -> tuple[Any, int]:
        tries.append(key)
        raise RuntimeError("unknown certificate")

    monkeypatch.setattr(S3Bucket, "open", fail)
    with caplog.at_level(logging.INFO, logger=s3.__name__):
        assert fetched(tmp_path) == CONTENT
    assert tries == ["set/a%41 b#c.tar"] * s3.MAX_FAILURES
    [line] = [record.getMessage() for record in caplog.records if record.name == s3.__name__]
    assert line == "s3://shards is read through fsspec, since obstore cannot read it (RuntimeError)"
    fetched(tmp_path)
    assert len(tries) == s3.MAX_FAILURES


def test_errors_are_those_of_fsspec(bucket: FaultyStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone.tar: FileNotFoundError"):
        fetch_file("s3://shards/set/gone.tar", tmp_path / "gone", num_bytes=9, timeout_seconds=20.0)
    bucket.fault = lambda method, path: "AccessDenied"
    with pytest.raises(StorageError, match=r"PermissionError: of AccessDenied"):
        fetched(tmp_path)


@pytest.mark.parametrize("more", [-100, 100])
def test_an_object_of_another_size_ends_at_once(bucket: FaultyStore, tmp_path: Path, more: int) -> None:
    with pytest.raises(StorageError, match=rf"has {len(CONTENT):,} bytes, but the index records"):
        fetched(tmp_path, num_bytes=len(CONTENT) + more)
    assert bucket.requests["GET"] == 1


def file_system(**changes: Any) -> Any:
    """Return a stand-in for an S3FileSystem, which compares by identity as fsspec's do by their arguments."""

    class FileSystem:
        protocol = ("s3", "s3a")
        client_kwargs: ClassVar[dict[str, Any]] = {}
        key = secret = token = session = None

        def split_path(self, path: str) -> tuple[str, str, str | None]:
            head, _, version = path.partition("?versionId=")
            name, _, key = head.partition("/")
            return name, key, version or None

    made = FileSystem()
    made.__dict__ |= changes
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": "gs"},
        {"protocol": ("simplecache",)},
        {"config_kwargs": {"proxies": {"https": "http://proxy"}}},
        {"client_kwargs": {"verify": "/certificates"}},
        {"s3_additional_kwargs": {"SSECustomerKey": "x"}},
        {"req_kw": {"RequestPayer": "requester"}},
    ],
)
def test_what_obstore_would_not_know_of_is_left_to_fsspec(changes: dict[str, Any]) -> None:
    pytest.importorskip("obstore", reason="needs obstore")
    assert stream_of(file_system(), "b/a.tar") is not None
    assert stream_of(file_system(), "b/a.tar?versionId=1") is None
    assert stream_of(file_system(**changes), "b/a.tar") is None


def test_credentials_are_those_of_the_file_system_and_are_renewed() -> None:
    given = asyncio.run(credentials(file_system(key="own", secret="hush")))
    assert [answer["access_key_id"] for answer in given] == ["own", "own"]
    names = iter(["first", "second"])

    async def frozen() -> Any:
        return SimpleNamespace(access_key=next(names), secret_key="hush", token="brief")

    async def get_credentials() -> Any:
        return SimpleNamespace(get_frozen_credentials=frozen)

    session = SimpleNamespace(get_credentials=get_credentials)
    found = asyncio.run(credentials(file_system(session=session)))
    assert [answer["access_key_id"] for answer in found] == ["first", "second"]
    assert {answer["token"] for answer in found} == {"brief"}


async def credentials(fs: Any) -> list[dict[str, Any]]:
    """Return what obstore gets when it asks twice."""
    ask = await s3._credentials(fs)
    return [await ask(), await ask()]
