"""Remote and compressed shards: complete and identical, or a clear error; never a hang or a short epoch."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard
from filelock import FileLock

from resnet_dist.config import Data
from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import Index, IndexMismatch, Shard, read_index
from resnet_dist.data.shards.names import expand
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.data.shards.verify import verify_index
from resnet_dist.data.storage import http, retry, transfer
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.data.storage.shard_cache import ShardCache
from resnet_dist.data.storage.stored_file import StoredFile
from resnet_dist.data.storage.transfer import read_bytes
from resnet_dist.errors import StorageError, UserError
from resnet_dist.system.files import checksum
from tests.data.conftest import data_of, loaders, write_shards
from tests.data.servers import (
    LOCALHOST,
    faulty_proxy,
    file_server,
    free_port,
    nginx_configuration,
    wait_for_port,
)
from tests.s3_server import S3Server

COUNTS = (40, 7, 60, 33, 52, 24)
STEPS = sum(COUNTS) // 48


@pytest.fixture
def served(tmp_path: Path, limits: CacheLimits) -> Path:
    """Make a folder with shards and an index that names them relative to itself."""
    folder = tmp_path / "served"
    build_index(expand(write_shards(folder, COUNTS)), folder, limits)
    return folder


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(http, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retry, "MAX_PAUSE_SECONDS", 0.1)


def remote_data(url: str, limits: CacheLimits, **changes: object) -> Data:
    own = {
        "shard_cache": str(limits.folder),
        "shard_cache_bytes": limits.max_bytes,
        "fetch_timeout_seconds": limits.timeout_seconds,
    }
    return data_of(Index(url, (), ()), **(own | changes))


def epoch_bytes(data: Data, steps: int = STEPS) -> list[bytes]:
    """Return pixels and labels of every batch of an epoch."""
    index = read_index(data.train)
    with loaders(index, data, 1)[0] as loader:
        batches = [loader.batch_at(step) for step in range(steps)]
    assert all(batch.weights_B.min() == 1 for batch in batches)
    return [batch.images_BSSC.numpy().tobytes() + batch.labels_B.numpy().tobytes() for batch in batches]


def faults(seed: int, share: float) -> Callable[[int], str | None]:
    """Return a fault by request number: with probability `share`, one of four; else None."""
    generator = random.Random(seed)
    draws = [
        generator.choice(["500", "reset", "truncate", "stall"]) if generator.random() < share else None
        for _ in range(100_000)
    ]
    return lambda number: draws[number]


def test_an_epoch_over_http_is_the_local_one(served: Path, limits: CacheLimits) -> None:
    with file_server(served) as server:
        assert epoch_bytes(remote_data(server.url, limits)) == epoch_bytes(remote_data(str(served), limits))
        assert server.requests["index.json"] == 1
        for path in served.glob("*.tar"):
            assert server.sent[path.name] == path.stat().st_size  # each byte once


def test_a_server_without_ranges(served: Path, limits: CacheLimits) -> None:
    with file_server(served, ranges=False) as server:
        assert epoch_bytes(remote_data(server.url, limits)) == epoch_bytes(remote_data(str(served), limits))


@pytest.mark.parametrize("seed", range(3))
def test_faults_on_the_way_change_nothing(served: Path, limits: CacheLimits, seed: int) -> None:
    with file_server(served) as server, faulty_proxy(server.port, faults(seed, 0.2)) as proxy:
        found = epoch_bytes(remote_data(proxy.url, limits))
        assert sum(proxy.faults.values()) - proxy.faults[None] > 10
    assert found == epoch_bytes(remote_data(str(served), limits))


@pytest.mark.parametrize("fault", ["500", "reset", "truncate", "stall"])
def test_a_server_that_stays_broken_ends_with_its_url_and_the_cause(
    served: Path, limits: CacheLimits, fault: str
) -> None:
    def after_index(number: int) -> str | None:
        return None if number == 0 else fault

    # Every request fails: half of an answer is not kept, so it is no progress.
    with file_server(served) as server, faulty_proxy(server.port, after_index) as proxy:
        data = remote_data(proxy.url, replace(limits, timeout_seconds=0.6))
        with pytest.raises(StorageError, match=rf"{proxy.url}/part-\d+.tar: nothing could be read for 1 s"):
            epoch_bytes(data)


def test_a_loader_closes_while_a_shard_does_not_come(served: Path, limits: CacheLimits) -> None:
    """Ctrl-C must not wait for the shard's timeout, which is here beyond the test's own limit."""

    def fault(number: int) -> str | None:
        return "stall" if number else None

    with file_server(served) as server, faulty_proxy(server.port, fault) as proxy:
        data = remote_data(proxy.url, replace(limits, timeout_seconds=10_000))
        loader = loaders(read_index(data.train), data, 1)[0]
        loader._submit(0)
        loader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith(("decode", "fetch"))]


def test_a_missing_file_fails_at_once(served: Path, limits: CacheLimits) -> None:
    next(served.glob("*3.tar")).unlink()
    with file_server(served) as server:
        with pytest.raises(StorageError, match=r"part-00003.tar: 404 Not Found"):
            epoch_bytes(remote_data(server.url, limits))
        with pytest.raises(IndexMismatch, match="no such index"):
            read_index(f"{server.url}/elsewhere")


def test_other_bytes_than_were_indexed_are_refused(served: Path, limits: CacheLimits) -> None:
    path = next(served.glob("*2.tar"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with file_server(served) as server, pytest.raises(StorageError, match="part-00002.tar: has sha256:"):
        epoch_bytes(remote_data(server.url, limits))


def test_a_broken_transfer_is_resumed(served: Path, limits: CacheLimits) -> None:
    path = served / "part-00002.tar"
    size = path.stat().st_size
    with file_server(served) as server:
        shard = StoredFile(f"{server.url}/part-00002.tar", size, checksum(path))
        cache = ShardCache(limits)
        partial = cache._cached_path(shard).with_suffix(".raw.partial")
        partial.parent.mkdir(parents=True)
        partial.write_bytes(path.read_bytes()[: size // 2])
        assert cache.path(shard).read_bytes() == path.read_bytes()
        cache.close()
        assert server.sent[path.name] == size - size // 2
        assert not partial.exists()


def test_a_partial_file_of_other_bytes_is_fetched_anew(served: Path, limits: CacheLimits) -> None:
    path = served / "part-00002.tar"
    with file_server(served) as server:
        shard = StoredFile(f"{server.url}/part-00002.tar", path.stat().st_size, checksum(path))
        cache = ShardCache(limits)
        partial = cache._cached_path(shard).with_suffix(".raw.partial")
        partial.parent.mkdir(parents=True)
        partial.write_bytes(b"x" * 5000)
        assert cache.path(shard).read_bytes() == path.read_bytes()
        cache.close()


PROCESS = """
import sys
from pathlib import Path
from resnet_dist.data.shards.index import read_index
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.data.storage.shard_cache import ShardCache
cache = ShardCache(CacheLimits(Path(sys.argv[2]), 2**30, 30.0))
for shard in read_index(sys.argv[1]).shards:
    print(len(cache.path(shard).read_bytes()))
cache.close()
"""


def test_processes_that_share_a_cache_fetch_each_shard_once(served: Path, limits: CacheLimits) -> None:
    with file_server(served) as server:
        command = [sys.executable, "-c", PROCESS, server.url, str(limits.folder)]
        with ThreadPoolExecutor(4) as pool:
            runs = list(
                pool.map(
                    lambda _: subprocess.run(command, capture_output=True, text=True, timeout=120), range(4)
                )
            )
        assert [run.returncode for run in runs] == [0] * 4, runs[0].stderr
        assert len({run.stdout for run in runs}) == 1
        for path in served.glob("*.tar"):
            assert server.sent[path.name] == path.stat().st_size


def test_the_cache_stays_within_its_limit(served: Path, limits: CacheLimits) -> None:
    sizes = sorted(path.stat().st_size for path in served.glob("*.tar"))
    small = replace(limits, max_bytes=sizes[-1] + sizes[-2])
    with file_server(served) as server:
        index = read_index(server.url)
        cache = ShardCache(small)
        for shard in (*index.shards, *index.shards):
            fd, _ = cache.open(shard)
            os.close(fd)
            kept = sum(path.stat().st_size for path in limits.folder.rglob("*.tar"))
            assert kept <= small.max_bytes
        cache.close()
        assert max(server.requests[path.name] for path in served.glob("*.tar")) > 1
        data = remote_data(server.url, small, window=1)
        assert epoch_bytes(data) == epoch_bytes(remote_data(str(served), limits, window=1))
        with pytest.raises(StorageError, match="larger than data.shard_cache_bytes=1,000"):
            epoch_bytes(remote_data(server.url, replace(limits, max_bytes=1000, folder=limits.folder / "b")))


def test_the_shard_that_was_not_used_for_longest_goes_first(served: Path, limits: CacheLimits) -> None:
    index = read_index(served)
    with file_server(served) as server:
        shards = [replace(shard, url=f"{server.url}/{shard.name}") for shard in index.shards[:4]]
        cache = ShardCache(replace(limits, max_bytes=sum(s.num_bytes for s in shards[:3])))
        for age, shard in zip((30, 20, 10), shards[:3], strict=True):
            path = cache.path(shard)
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
        # Use the two oldest once more, so that the third is now the oldest.
        cache.path(shards[0])
        cache.path(shards[1])
        cache.path(shards[3])
        cache.close()
        assert not cache.is_at_hand(shards[2])
        assert cache.is_at_hand(shards[3])


def compress(path: Path, suffix: str) -> Path:
    content = path.read_bytes()
    packed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    target = path.with_name(path.name + suffix)
    target.write_bytes(packed)
    path.unlink()
    path.with_suffix(".idx").unlink()
    return target


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_shards_here_and_remote(served: Path, limits: CacheLimits, suffix: str) -> None:
    expected = epoch_bytes(remote_data(str(served), limits))
    names = [str(compress(path, suffix)) for path in sorted(served.glob("*.tar"))]
    index, findings = build_index(expand(names), served, limits)
    assert (index.counts, findings.left_out) == (COUNTS, [])
    assert epoch_bytes(remote_data(str(served), limits)) == expected
    with file_server(served) as server:
        other = replace(limits, folder=limits.folder / "other")
        assert epoch_bytes(remote_data(server.url, other)) == expected
        assert verify_index(server.url, other) == []


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("remote_shard", [False, True])
def test_an_index_sees_what_is_there_now(
    tmp_path: Path, limits: CacheLimits, suffix: str, remote_shard: bool
) -> None:
    """It ignores what an earlier index left in the cache, and a damaged shard leaves nothing there."""
    folder = tmp_path / "packed"

    def pack(count: int, cut: int = 0) -> None:
        (name,) = write_shards(folder, (count,))
        Path(name).with_suffix(".idx").touch()
        target = compress(Path(name), suffix)
        target.write_bytes(target.read_bytes()[: -cut or None])

    with file_server(folder) as server:
        names = [f"{server.url if remote_shard else folder}/part-00000.tar{suffix}"]
        for count in (20, 31):
            pack(count)
            index, _ = build_index(expand(names), tmp_path, limits)
            assert index.counts == (count,)
            assert index.shards[0].checksum == checksum(folder / f"part-00000.tar{suffix}")
            assert verify_index(str(tmp_path), limits) == []
        pack(31, cut=700)
        with pytest.raises(UserError, match=r"part-00000.tar.*cut off"):
            build_index(expand(names), tmp_path, limits)
        assert not [path for path in limits.folder.rglob("*") if path.suffix in (".partial", ".raw")]
        pack(31)
        assert build_index(expand(names), tmp_path, limits)[0].counts == (31,)


def test_evicted_shards_are_let_go(served: Path, limits: CacheLimits) -> None:
    """A removed file that is still open would keep its space on the disk."""
    with file_server(served) as server:
        index = read_index(server.url)
        largest = max(shard.num_bytes for shard in index.shards)
        reader = ShardReader(index, replace(limits, max_bytes=2 * largest))
        first = 0
        for count in index.counts:
            reader.read(first)
            first += count
            gone = [file for file in reader._files.values() if os.fstat(file.fd).st_nlink == 0]
            assert not gone
        reader.close()


def test_a_command_that_hangs_is_ended(tmp_path: Path, limits: CacheLimits) -> None:
    marker = tmp_path / "pid"
    shard = Shard(f"pipe:echo $$ > {marker}; sleep 1000", 0, "", 1)
    cache = ShardCache(replace(limits, allow_commands=True, timeout_seconds=0.5))
    with pytest.raises(StorageError, match="wrote nothing for"):
        cache.path(shard)
    cache.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


def test_a_compressed_shard_that_unpacks_to_too_much(tmp_path: Path, limits: CacheLimits) -> None:
    bomb = tmp_path / "bomb.tar.gz"
    bomb.write_bytes(gzip.compress(bytes(50_000_000)))
    with pytest.raises(UserError, match="unpacks to more than"):
        build_index(expand([str(bomb)]), tmp_path, replace(limits, max_bytes=1_000_000))
    assert not [path for path in limits.folder.rglob("*") if path.is_file() and path.stat().st_size > 1000]


def test_commands_are_refused_unless_allowed(served: Path, limits: CacheLimits, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    command = f"pipe:touch {marker}; cat {served}/part-00000.tar"
    with pytest.raises(UserError, match="--allow-commands"):
        build_index(expand([command]), tmp_path, limits)
    with pytest.raises(UserError, match="--allow-commands"):
        ShardCache(limits).path(Shard(command, 0, "", COUNTS[0]))
    assert not marker.exists()
    allowed = replace(limits, allow_commands=True)
    index, _ = build_index(expand([command]), tmp_path, allowed)
    assert index.counts == COUNTS[:1]
    with pytest.raises(UserError, match="cat: /nowhere"):
        build_index(expand(["pipe:cat /nowhere"]), tmp_path, allowed)


def test_an_unknown_scheme(limits: CacheLimits, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nosuch"):
        build_index(expand(["nosuch://bucket/a.tar"]), tmp_path, limits)


def test_an_index_over_http_is_verified(served: Path, limits: CacheLimits) -> None:
    with file_server(served) as server:
        assert verify_index(server.url, limits) == []
        names = f"{server.url}/part-{{00000..0000{len(COUNTS) - 1}}}.tar"
        index, _ = build_index(expand([names]), served.parent / "elsewhere", limits)
        assert index.counts == COUNTS
        assert (
            json.loads(Path(index.location).read_text())["shardlist"][0]["url"]
            == f"{server.url}/part-00000.tar"
        )


def test_verifying_looks_at_what_is_served_and_at_what_is_in_the_cache(
    served: Path, limits: CacheLimits
) -> None:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    with file_server(served) as server:
        assert verify_index(server.url, limits) == []
        cache, shard = ShardCache(limits), read_index(server.url).shards[2]
        change(cache.path(shard))
        [problem] = verify_index(server.url, limits)
        assert re.match(r"http\S*part-00002.tar: the copy in \S* has sha256:.* it was fetched anew$", problem)
        assert verify_index(server.url, limits) == []
        assert cache.path(shard).read_bytes() == (served / shard.name).read_bytes()
        change(served / shard.name)
        [problem] = verify_index(server.url, limits)
        assert re.match(r"http\S*part-00002.tar: has sha256:.* but the index records", problem)
        cache.close()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_verifying_unpacks_compressed_shards_anew(served: Path, limits: CacheLimits, suffix: str) -> None:
    names = [str(compress(path, suffix)) for path in sorted(served.glob("*.tar"))]
    index, _ = build_index(expand(names), served, limits)
    cache = ShardCache(limits)
    expected = cache.path(index.shards[0]).read_bytes()
    cache.path(index.shards[0]).write_bytes(bytes(len(expected)))
    cache.path(index.shards[0]).with_suffix(".idx").unlink(missing_ok=True)
    assert verify_index(str(served), limits) == []
    assert cache.path(index.shards[0]).read_bytes() == expected
    cache.close()


def test_indexing_leaves_nothing_in_the_cache(served: Path, limits: CacheLimits, tmp_path: Path) -> None:
    with file_server(served) as server:
        names = f"{server.url}/part-{{00000..0000{len(COUNTS) - 1}}}.tar"
        build_index(expand([names]), tmp_path / "own", limits)
    left = {path.name for path in limits.folder.rglob("*") if path.is_file()}
    assert left <= {".evicting.lock"}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_the_compression_of_a_commands_output_is_read_from_its_bytes(
    served: Path, limits: CacheLimits, tmp_path: Path, suffix: str
) -> None:
    path, allowed = served / "part-00000.tar", replace(limits, allow_commands=True)
    packed = compress(path, suffix) if suffix else path
    liar = packed.rename(packed.with_name("liar.tar" if suffix else "liar.tar.gz"))
    index, _ = build_index(expand([f"pipe:cat {liar}"]), tmp_path, allowed)
    assert index.counts == COUNTS[:1]
    assert index.shards[0].checksum == checksum(liar)
    assert verify_index(str(tmp_path), allowed) == []


def test_a_file_that_has_grown_ends_at_once(served: Path, limits: CacheLimits) -> None:
    path = served / "part-00002.tar"
    shard = StoredFile("", path.stat().st_size, checksum(path))
    with path.open("ab") as file:
        file.write(bytes(5000))
    with file_server(served, ranges=False) as server:
        cache = ShardCache(limits)
        with pytest.raises(StorageError, match=r"part-00002.tar: has .* bytes, but the index records"):
            cache.path(replace(shard, url=f"{server.url}/{path.name}"))
        cache.close()
        assert server.requests[path.name] == 1


class NoCredentialsError(Exception):
    """An error with the name of botocore's."""


class Answer(Exception):
    def __init__(self, **fields: object) -> None:
        self.__dict__ |= fields


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (StorageError("the server does not report its size"), True),
        (NoCredentialsError("Unable to locate credentials"), True),
        (Answer(status=403), True),
        (Answer(code=404), True),
        (Answer(code="404"), True),
        (Answer(response=SimpleNamespace(status_code=401)), True),
        (Answer(response={"Error": {"Code": "SlowDown"}}), False),
        (Answer(code=429), False),
        (Answer(code="503"), False),
        (Answer(response=SimpleNamespace(status_code=503)), False),
        (OSError("reset"), False),
    ],
)
def test_an_error_that_a_retry_cannot_cure_is_not_retried(error: Exception, permanent: bool) -> None:
    tries: list[int] = []

    def read() -> None:
        tries.append(1)
        raise error

    with pytest.raises(StorageError):
        retry.Patience("x://y", 0.03).retry(read)
    assert (len(tries) == 1) == permanent


def test_closing_ends_a_pause(served: Path, limits: CacheLimits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 200.0)
    with file_server(served) as server, faulty_proxy(server.port, lambda number: "500") as proxy:
        cache = ShardCache(replace(limits, timeout_seconds=10_000))
        fetched = cache._begin(Shard(f"{proxy.url}/part-00000.tar", 1, "", 1))
        while not proxy.faults:
            time.sleep(0.01)
        start = time.monotonic()
        cache.close()
        with pytest.raises(StorageError, match="part-00000.tar: given up, the loader was closed"):
            fetched.result()
        assert time.monotonic() - start < 60


def test_closing_while_another_process_fetches_blames_nobody(limits: CacheLimits) -> None:
    cache, shard = ShardCache(limits), Shard("http://127.0.0.1:9/a.tar", 1, "", 1)
    lock = cache._cached_path(shard).with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        fetched = cache._begin(shard)
        cache.close()
        with pytest.raises(StorageError, match="given up, the loader was closed"):
            fetched.result()


def test_what_is_wanted_is_evicted_last(served: Path, limits: CacheLimits) -> None:
    with file_server(served) as server:
        cache, shard = ShardCache(limits), read_index(server.url).shards[0]
        path = cache.path(shard)
        os.utime(path, (1, 1))
        cache.want([shard])
        assert path.stat().st_mtime > 1
        cache.close()


@pytest.fixture
def nginx(served: Path, tmp_path: Path) -> Iterator[int]:
    if shutil.which("nginx") is None:
        pytest.skip("needs nginx (apt-get install nginx-light)")
    port = free_port()
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(nginx_configuration(served, tmp_path, f"{LOCALHOST}:{port}"))
    process = subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", str(configuration)])
    try:
        wait_for_port(port)
        yield port
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("seed", range(3))
def test_nginx_with_faults_in_between(served: Path, limits: CacheLimits, nginx: int, seed: int) -> None:
    with faulty_proxy(nginx, faults(seed, 0.25)) as proxy:
        found = epoch_bytes(remote_data(proxy.url, limits))
        assert {"500", "reset", "truncate", "stall"} <= set(proxy.faults)
    assert found == epoch_bytes(remote_data(str(served), limits))
    with faulty_proxy(nginx, lambda number: "500" if number > 5 else None) as proxy:
        data = remote_data(proxy.url, replace(limits, timeout_seconds=0.3, folder=limits.folder / "new"))
        with pytest.raises(StorageError, match="nothing could be read"):
            epoch_bytes(data)


@pytest.fixture
def in_s3(served: Path, s3: S3Server) -> str:
    """Copy the served folder to a new bucket and return its URL."""
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
    name = s3.new_bucket()
    s3fs.S3FileSystem(skip_instance_cache=True).put(str(served), f"{name}/set", recursive=True)
    return f"s3://{name}/set"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_an_epoch_from_s3_is_the_local_one(served: Path, limits: CacheLimits, in_s3: str) -> None:
    assert epoch_bytes(remote_data(in_s3, limits)) == epoch_bytes(remote_data(str(served), limits))
    with pytest.raises(IndexMismatch, match="no such index"):
        read_index(in_s3.replace("/set", "/elsewhere"))
    missing = Shard(f"{in_s3}/gone.tar", 100, "", 1)
    with pytest.raises(StorageError, match=r"gone.tar: FileNotFoundError"):
        ShardCache(limits).path(missing)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_keys_and_patterns_of_s3(served: Path, limits: CacheLimits, in_s3: str, tmp_path: Path) -> None:
    import s3fs

    bucket, content = s3fs.S3FileSystem(skip_instance_cache=True), (served / "part-00000.tar").read_bytes()
    odd = [f"{in_s3}/odd/{name}.tar" for name in ("a#b", "a+b c", "what?", "st*r", "100%41")]
    for url in odd:
        bucket.pipe_file(url, content)
    bucket.pipe_file(f"{in_s3}/odd/notes.txt", b"x")
    for url in odd:
        index, _ = build_index(expand([url]), tmp_path / "own", limits)
        assert [(shard.url, shard.num_samples) for shard in index.shards] == [(url, COUNTS[0])]
        assert index.shards[0].name == url.rpartition("/")[2]
    bucket.invalidate_cache()
    for pattern in (f"{in_s3}/odd/*.tar", f"{in_s3}/odd/", f"{in_s3}/odd"):
        assert [shard.url for shard in expand([pattern])] == sorted(odd)
    assert read_index(f"{in_s3}/").digest() == read_index(served).digest()
    with pytest.raises(UserError, match="matches no file"):
        expand([f"{in_s3}/none*.tar"])


def test_the_cache_keeps_names_of_two_sets_apart(tmp_path: Path, limits: CacheLimits) -> None:
    for name, count in (("train", 3), ("val", 5)):
        write_shards(tmp_path / name, (count,))
    with file_server(tmp_path) as server:
        cache = ShardCache(limits)
        paths = {cache.path(Shard(f"{server.url}/{n}/part-00000.tar", 0, "", 0)) for n in ("train", "val")}
        assert {path.read_bytes() for path in paths} == {
            (tmp_path / n / "part-00000.tar").read_bytes() for n in ("train", "val")
        }
        assert read_bytes(f"{server.url}/train/part-00000.tar")
        cache.close()
    assert np.all([path.exists() for path in paths])


def test_a_driver_that_blocks_forever_is_given_up_after_the_timeout() -> None:
    patience, released = retry.Patience("sftp://h/a.tar", 0.3), threading.Event()
    try:
        with pytest.raises(StorageError, match=r"sftp://h/a\.tar: nothing could be read"):
            patience.retry(lambda: patience.call(lambda: released.wait(30)))
    finally:
        released.set()
