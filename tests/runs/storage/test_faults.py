"""A bucket whose server refuses, breaks off, loses answers, or says no: retried, or explained in one sentence."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_dist.errors import StorageError, UserError
from resnet_dist.runs.storage import client
from resnet_dist.runs.storage.client import explained
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Storage, Unreachable
from tests.data.servers import LOCALHOST, free_port
from tests.s3_server import S3Server

COMMIT = "commit.json"
FAULTS = ("500", "refuse", "cut request", "cut answer", "lose answer")


@pytest.fixture
def storage(s3: S3Server) -> Storage:
    return open_storage(f"s3://{s3.new_bucket()}/x")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give calls up soon."""
    monkeypatch.setattr(client, "SMALL_RETRY_SECONDS", 0.3)
    monkeypatch.setattr(client, "LARGE_RETRY_SECONDS", 0.3)
    client._client.cache_clear()
    yield
    client._client.cache_clear()


def fail_sometimes(s3: S3Server, share: float, seed: int = 0) -> None:
    rng = random.Random(seed)
    s3.proxy.fault = lambda method, path: rng.choice(FAULTS) if rng.random() < share else None


@pytest.mark.parametrize(("share", "rounds"), [(0.3, 3), pytest.param(0.05, 60, marks=pytest.mark.long)])
def test_broken_requests_cannot_be_seen(s3: S3Server, storage: Storage, share: float, rounds: int) -> None:
    fail_sometimes(s3, share)
    writer, bundles = storage.log("spool.jsonl").open(), storage.at("checkpoints").bundles(COMMIT)
    storage.write("lease", b"0")
    for number in range(rounds):
        assert storage.create(f"objects/{number}", str(number).encode())
        assert not storage.create(f"objects/{number}", b"other")
        assert storage.read(f"objects/{number}") == str(number).encode()
        found = storage.read_version("lease")
        assert found is not None
        assert storage.replace("lease", str(number + 1).encode(), found.version) is not None
        assert storage.replace("lease", b"other", found.version) is None
        writer.write(f"{number}\n".encode())
        writer.flush()
        content = bytes([number]) * (100_000 + number)
        with bundles.write(f"b{number}") as made:
            (made / "model.bin").write_bytes(content)
            (made / COMMIT).write_text(json.dumps(number))
        assert (bundles.fetch(f"b{number}") / "model.bin").read_bytes() == content
        if number:
            bundles.remove(f"b{number - 1}")
    writer.close()
    assert storage.read("lease") == str(rounds).encode()
    assert storage.log("spool.jsonl").read()[0] == b"".join(f"{n}\n".encode() for n in range(rounds))
    assert bundles.names() == [f"b{rounds - 1}"]
    assert len(storage.objects("objects")) == rounds
    assert sum(s3.proxy.seen.values()) > rounds * share


@pytest.mark.parametrize("seconds", [1.0, pytest.param(12.0, marks=pytest.mark.long)])
def test_an_outage_is_waited_for(s3: S3Server, storage: Storage, seconds: float) -> None:
    storage.write("a", b"1")
    s3.proxy.fault = lambda method, path: "refuse"
    end = threading.Timer(seconds, lambda: setattr(s3.proxy, "fault", lambda method, path: None))
    end.start()
    assert storage.read("a") == b"1"
    assert s3.proxy.seen["refuse"] > 0
    end.join()


@pytest.mark.usefixtures("impatient")
def test_metrics_outlive_an_outage_that_is_longer_than_a_call(
    s3: S3Server, storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("resnet_dist.runs.storage.logs.SHIP_SECONDS", 0.05)
    storage = open_storage(storage.location)
    log = storage.log("spool.jsonl")
    writer = log.open()
    s3.proxy.fault = lambda method, path: "refuse"
    for number in range(2):
        writer.write(f"{number}\n".encode())
        with pytest.raises(Unreachable, match="it answers with errors"):
            writer.flush()
    s3.proxy.fault = lambda method, path: (
        "lose answer" if method == "PUT" and s3.proxy.seen["lose answer"] < 2 else None
    )
    writer.close()
    assert log.read()[0] == b"0\n1\n"
    assert caplog.text.count("metrics wait for their storage") <= 1


def test_two_writers_of_a_log_do_not_mix(storage: Storage) -> None:
    """An attempt that lost its driver writes beside its successor."""
    log = storage.log("spool.jsonl")
    old = log.open()
    old.write(b"old 0\n")
    old.flush()
    new = log.open()
    new.write(b"new 1\n")
    new.flush()
    old.write(b"old 1\n")
    with pytest.raises(StorageError, match="another attempt of this run writes its metrics now"):
        old.flush()
    with pytest.raises(StorageError, match="another attempt"):
        old.write(b"old 2\n")
    new.write(b"new 2\n")
    new.close()
    assert log.read()[0] == b"old 0\nnew 1\nnew 2\n"


def test_a_segment_of_a_killed_writer_that_arrives_late_stops_nobody(storage: Storage) -> None:
    log = storage.log("spool.jsonl")
    new = log.open()
    storage.write("spool/00000001.jsonl", b"late\n")
    for line in (b"new 1\n", b"new 2\n"):
        new.write(line)
        new.flush()
    new.close()
    assert log.read()[0] == b"late\nnew 1\nnew 2\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "AccessDenied",
            "access is denied: AWS_ACCESS_KEY_ID, .* must be allowed to read, write, list and delete",
        ),
        ("InvalidAccessKeyId", "the store does not accept the credentials; check AWS_ACCESS_KEY_ID"),
        ("RequestTimeTooSkewed", "the clock of this machine differs too much from that of the store"),
        (
            "ignore conditions",
            r"the store ignores conditions \(If-None-Match\), so two processes could train one run",
        ),
    ],
)
def test_a_store_that_says_no_is_explained_before_anything_starts(
    s3: S3Server, storage: Storage, code: str, words: str
) -> None:
    s3.proxy.fault = lambda method, path: code
    with pytest.raises(UserError, match=words) as refused:
        storage.check()
    assert "hush" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 330


def test_a_bucket_that_does_not_exist(s3: S3Server) -> None:
    with pytest.raises(UserError, match=r"^s3://nowhere-at-all/x: there is no such bucket; create it"):
        open_storage("s3://nowhere-at-all/x").check()
    with pytest.raises(StorageError, match="there is no such bucket"):
        open_storage("s3://nowhere-at-all/x").folders()


@pytest.mark.usefixtures("s3", "impatient")
def test_an_address_without_a_store_is_not_tried_as_long_as_a_store_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SMALL_RETRY_SECONDS", "LARGE_RETRY_SECONDS"):
        monkeypatch.setattr(client, name, 1e6)  # The test would not end.
    for name in ("UNKNOWN_SECONDS", "REFUSED_SECONDS"):
        monkeypatch.setattr(client, name, 0.3)
    for address, words in (
        ("http://no-such-host.invalid", "the host of its endpoint is unknown"),
        (f"http://{LOCALHOST}:{free_port()}", "its endpoint refuses connections"),
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises(UserError, match=rf"^s3://b at {address}: {words}"):
            open_storage("s3://b/x").check()


def test_a_store_that_starts_late_is_waited_for(s3: S3Server, storage: Storage) -> None:
    """Its first answers are errors: they are no reason to give up before anything starts."""
    answers = iter(["500", "503"])
    s3.proxy.fault = lambda method, path: next(answers, None)
    storage.check()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "Error performing PUT http://169.254.169.254/latest/api/token in 1s",
            "no credentials were found; set AWS",
        ),
        ("301 Moved Permanently: <Code>PermanentRedirect</Code>", "in another region; set AWS_REGION"),
        ("Server returned non-2xx status code: 501 Not Implemented", "a request that runs need"),
    ],
)
def test_errors_in_words(text: str, words: str) -> None:
    error = explained("s3://b", RuntimeError(text))
    assert words in str(error)
    assert not isinstance(error, Unreachable)


@pytest.mark.parametrize(
    "text",
    [
        "Server returned non-2xx status code: 507 Insufficient Storage: ",
        "403 Forbidden: <Error><Code>QuotaExceeded</Code></Error>",
        "507: <Code>XMinioStorageFull</Code>",
    ],
)
def test_a_store_without_room_is_tried_again(text: str) -> None:
    error = explained("s3://b", RuntimeError(text))
    assert isinstance(error, Unreachable)
    assert str(error).startswith("s3://b: it has no room left (")


@pytest.mark.parametrize(
    ("location", "words"),
    [
        (
            "ftp://host/x",
            "runs cannot be kept there; give a folder, or a URL that begins with s3://, gs://, az://",
        ),
        ("https://host/x", "runs cannot be kept there"),
        ("s3://key:hush@bucket/x", r"s3://\*\*\*@bucket/x: holds credentials, and a run records its URL"),
        ("s3:///x", "not a bucket and a prefix; give s3://BUCKET/PREFIX"),
        ("s3://bucket/x?versionId=3", "not a bucket and a prefix"),
    ],
)
def test_urls_that_hold_no_runs(location: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_storage(location)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; give another folder"):
        open_storage(tmp_path / "file/output").check()
    open_storage(tmp_path / "a/b/c").check()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_the_library(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    client._client.cache_clear()
    with pytest.raises(UserError, match="obstore, which reads and writes it, is not installed"):
        open_storage("s3://b/x")
    open_storage(tmp_path).check()
