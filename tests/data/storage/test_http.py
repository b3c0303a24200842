"""Web servers as they are: every way to send a file is read, and every refusal names its true reason."""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import IndexMismatch, read_index
from resnet_dist.data.shards.names import expand
from resnet_dist.data.shards.verify import verify_index
from resnet_dist.data.storage import http, retry, transfer
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.data.storage.shard_cache import ShardCache
from resnet_dist.data.storage.stored_file import StoredFile
from resnet_dist.data.storage.transfer import exists, read_bytes
from resnet_dist.data.storage.urls import file_name, join, local_path, path_of, request_url, shown, unsigned
from resnet_dist.errors import StorageError, UserError
from tests.data.conftest import write_shards
from tests.data.odd_server import SIGNATURE, OddServer, odd_server
from tests.data.servers import free_port

COUNTS = (40, 7)
NAMES = "part-{00000..00001}.tar"


@pytest.fixture
def server(tmp_path: Path, limits: CacheLimits) -> Iterator[OddServer]:
    folder = tmp_path / "served"
    build_index(expand(write_shards(folder, COUNTS)), folder, limits)
    with odd_server(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(http, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retry, "MAX_PAUSE_SECONDS", 0.1)


FLAKY = [f"flaky-{status}" for status in (408, 429, 500, 502, 503, 504)]
READ = [
    "plain",
    "norange",
    "chunked",
    "headzero",
    "head-403",
    "head-405",
    "gzip",
    "gzipalways",
    "wrongrange",
    "python",
]


@pytest.mark.parametrize("mode", READ + FLAKY)
def test_shards_and_index_are_read(server: OddServer, limits: CacheLimits, tmp_path: Path, mode: str) -> None:
    index, findings = build_index(expand([f"{server.url}/{mode}/{NAMES}"]), tmp_path / "own", limits)
    assert (index.counts, findings.left_out) == (COUNTS, [])
    served = read_index(tmp_path / "served")
    assert [s.checksum for s in index.shards] == [s.checksum for s in served.shards]
    remote = read_index(f"{server.url}/{mode}")
    assert remote.digest() == served.digest()
    assert verify_index(remote.location, limits) == []


def test_a_gzip_that_a_server_labels_as_encoded_is_the_file(
    server: OddServer, limits: CacheLimits, tmp_path: Path
) -> None:
    for path in sorted((tmp_path / "served").glob("*.tar")):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    for mode in ("plain", "gziplabel", "gzipalways"):
        index, _ = build_index(expand([f"{server.url}/{mode}/{NAMES}.gz"]), tmp_path / mode, limits)
        assert index.counts == COUNTS, mode
    # A label on bytes that are not compressed.
    assert (
        build_index(expand([f"{server.url}/gziplabel/{NAMES}"]), tmp_path / "b", limits)[0].counts == COUNTS
    )


def test_a_query_is_sent_byte_for_byte_also_after_a_redirect(
    server: OddServer, limits: CacheLimits, tmp_path: Path
) -> None:
    index, _ = build_index(expand([f"{server.url}/signed/{NAMES}?{SIGNATURE}"]), tmp_path / "a", limits)
    assert index.counts == COUNTS
    assert build_index(expand([f"{server.url}/redirect/{NAMES}"]), tmp_path / "b", limits)[0].counts == COUNTS
    with pytest.raises(UserError, match=r"403 Forbidden \(SignatureDoesNotMatch; .*expired"):
        build_index(expand([f"{server.url}/signed/{NAMES}?Signature=other"]), tmp_path / "c", limits)


def test_the_query_of_an_index_serves_its_shards(
    server: OddServer, limits: CacheLimits, tmp_path: Path
) -> None:
    for location in (f"{server.url}/signed?{SIGNATURE}", f"{server.url}/signed/index.json?{SIGNATURE}"):
        index = read_index(location)
        assert index.digest() == read_index(tmp_path / "served").digest()
        assert verify_index(location, limits) == []


def test_a_set_that_is_signed_anew_is_the_same_set(limits: CacheLimits) -> None:
    cache = ShardCache(limits)
    a, b, c = (
        StoredFile(f"https://host/set/a.tar?{query}", 0, "")
        for query in ("id=1&X-Amz-Signature=x%2F1", "id=1&X-Amz-Signature=y", "id=2&X-Amz-Signature=x")
    )
    assert cache._cached_path(a) == cache._cached_path(b) != cache._cached_path(c)
    assert a.name == b.name == "a.tar?id=1"
    cache.close()


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("status-401", "401 Unauthorized .*netrc"),
        ("status-403", "403 Forbidden"),
        ("status-404", "404 Not Found"),
        ("page", "answers with a web page .'Sign in'"),
    ],
)
def test_what_no_retry_cures_ends_at_once(
    server: OddServer, limits: CacheLimits, tmp_path: Path, mode: str, reason: str
) -> None:
    url = f"http://name:hushhush@127.0.0.1:{server.port}/{mode}"
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"part-00000.tar\?sig=\*\*\*: .*{reason}") as error:
        build_index(expand([f"{url}/{NAMES}?sig=hushhush"]), tmp_path / "own", limits)
    with pytest.raises(IndexMismatch) as other:
        read_index(f"{url}?sig=hushhush")
    assert time.monotonic() - start < 3
    assert "hushhush" not in str(error.value) + str(other.value)


def test_hosts_that_do_not_answer_are_told_apart(limits: CacheLimits, tmp_path: Path) -> None:
    for host, reason in (
        (f"127.0.0.1:{free_port()}", "connection refused by"),
        ("nowhere.invalid", "unknown host"),
    ):
        with pytest.raises(UserError, match=reason):
            build_index(expand([f"http://{host}/a.tar"]), tmp_path / "own", limits)


def test_retry_after_is_honoured_and_existence_is_asked_again(server: OddServer) -> None:
    start = time.monotonic()
    assert read_bytes(f"{server.url}/later/index.json")
    assert time.monotonic() - start >= 1
    assert exists(f"{server.url}/flaky-503/index.json")
    assert not exists(f"{server.url}/plain/other.json")
    with pytest.raises(StorageError, match="403"):
        exists(f"{server.url}/status-403/index.json")


def test_a_long_wait_is_reported(
    server: OddServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retry, "FIRST_REPORT_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError):
        read_bytes(f"{server.url}/status-503/index.json?sig=hush", timeout_seconds=1.0)
    assert "has waited" in caplog.text
    assert "503 Service Unavailable; gives up after 1 s" in caplog.text
    assert "hush" not in caplog.text


def test_passwords_come_from_the_url_netrc_and_configuration(
    server: OddServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: CacheLimits
) -> None:
    import fsspec

    user = f"http://user:p%40ss%2Fword@127.0.0.1:{server.port}"
    index, _ = build_index(expand([f"{user}/basic/{NAMES}"]), tmp_path / "own", limits)
    assert "word" not in Path(index.location).read_text()
    assert read_index(f"{user}/basic").counts == COUNTS
    assert verify_index(f"{user}/basic", limits) == []
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password p@ss/word\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert verify_index(index.location, limits) == []  # written without the password
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"X-Team": "blue"}})
    assert read_index(f"{server.url}/header").counts == COUNTS
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"headers": {"x-team": "blue"}}})
    assert read_index(f"{server.url}/header").counts == COUNTS


def test_a_proxy_is_used_unless_no_proxy_names_the_host(
    server: OddServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(FileNotFoundError):
        read_bytes("http://far.invalid/plain/index.json")
    assert server.log == ["GET http://far.invalid/plain/index.json"]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert read_bytes(f"{server.url}/plain/index.json")
    assert server.log[-1] == "GET /plain/index.json"


def test_names_with_odd_characters(server: OddServer, tmp_path: Path, limits: CacheLimits) -> None:
    folder = tmp_path / "served" / "my set#1"
    write_shards(folder, (3,))
    odd = folder / "a #b+c?d 100%.tar"
    (folder / "part-00000.tar").rename(odd)
    index = {"shardlist": [{"url": odd.name, "nsamples": 3}], "classes": [str(n) for n in range(10)]}
    (folder / "index.json").write_text(json.dumps(index))
    remote = read_index(f"{server.url}/plain/my set#1")
    assert remote.digest() == read_index(folder).digest()
    assert verify_index(remote.location, limits) == []
    encoded = f"file://{str(folder).replace(' ', '%20').replace('#', '%23')}"
    assert read_index(encoded).counts == (3,)
    assert expand([str(folder / "*.tar")])[0].url == str(odd)
    assert expand([str(odd)])[0].url == str(odd)
    with pytest.raises(UserError, match="matches no file"):
        expand([str(folder / "*.tgz")])
    for pattern in ("*.tar", ""):
        with pytest.raises(UserError, match="braces"):
            expand([f"{server.url}/plain/{pattern}"])


def test_a_redacted_url_is_refused(server: OddServer) -> None:
    with pytest.raises(UserError, match="left out"):
        read_bytes(f"{server.url}/plain/index.json?sig=***")


def test_urls() -> None:
    assert local_path("~/x") == Path.home() / "x"
    assert local_path("file:///a%20b") == Path("/a b")
    assert path_of("s3://b/what?.tar") == "s3://b/what?.tar"
    assert path_of("s3://b/a.tar?versionId=1") == "s3://b/a.tar"
    assert join("http://h/set?s=1", "a.tar?s=2") == "http://h/set/a.tar?s=2"
    assert join("http://u:p@h/set?s=1", "http://h/b/a.tar") == "http://u:p@h/b/a.tar?s=1"
    assert join("http://u:p@h/set?s=1", "http://other/a.tar") == "http://other/a.tar"
    assert request_url("http://h/a b%20c%.tar?x=a%2Fb+c") == "http://h/a%20b%20c%25.tar?x=a%2Fb+c"
    assert request_url("http://h?x=1") == "http://h/?x=1"
    assert unsigned("http://u:p@h/a?sv=1&sig=2&id=3") == "http://h/a?id=3"
    assert unsigned("http://h/a?st=1&se=2") == "http://h/a?st=1&se=2"
    assert file_name("https://h/x%20y/a%2Bb.tar?Signature=/q") == "a+b.tar"
    assert shown("https://u:p@ss@h/a.tar?sig=1&versionId=7") == "https://***@h/a.tar?sig=***&versionId=7"
