"""The shards of a folder, the compressed ones under any name, and what else lies there."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from resnet_dist.data.findings import Findings
from resnet_dist.data.shards.build import build_index, num_compressed
from resnet_dist.data.shards.index import check_shards, read_index
from resnet_dist.data.shards.names import expand
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.data.shards.verify import verify_index
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.errors import UserError
from tests.data.conftest import encoded, picture, write_members, write_shards
from tests.data.servers import file_server

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "zstd": zstandard.compress,
}


@pytest.fixture
def plain(tmp_path: Path) -> bytes:
    [name] = write_shards(tmp_path / "made", (9,))
    return Path(name).read_bytes()


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", ["0.tar", "0.TAR", "0.tar.gz", "0.TGZ", "0.tar.bz2", "0.txz", "shard"])
def test_the_bytes_say_how_a_shard_is_compressed(
    tmp_path: Path, limits: CacheLimits, plain: bytes, packer: str, name: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(PACKERS[packer](plain))
    shards = expand([str(folder / name)])
    assert num_compressed(shards) == (packer != "plain")
    build_index(shards, folder, limits)
    index = read_index(folder)
    assert index.counts == (9,)
    check_shards(index)
    assert ShardReader(index, limits).read(8).image == encoded(picture(8))
    assert verify_index(str(folder), limits) == []


@pytest.mark.parametrize("packer", ["gzip", "bzip2", "xz"])
def test_a_remote_shard_too(tmp_path: Path, limits: CacheLimits, plain: bytes, packer: str) -> None:
    (tmp_path / "0.tar").write_bytes(PACKERS[packer](plain))
    with file_server(tmp_path) as server:
        index, _ = build_index(expand([f"{server.url}/0.tar"]), tmp_path / "own", limits)
        assert index.shards[0].num_bytes == (tmp_path / "0.tar").stat().st_size
        assert ShardReader(index, limits).read(8).image == encoded(picture(8))
        assert verify_index(index.location, limits) == []


@pytest.mark.parametrize("packer", ["gzip", "bzip2", "xz", "zstd"])
def test_damage_in_a_compressed_shard_is_named(
    tmp_path: Path, limits: CacheLimits, plain: bytes, packer: str
) -> None:
    path = tmp_path / "0.tar"
    packed = PACKERS[packer](plain)
    half = len(packed) // 2
    changed = packed[:half] + bytes(50) + packed[half + 50 :]
    # zstandard.compress writes no checksum, without which changed pixels are no damage to the frame.
    for damaged in (packed[:-40], *([] if packer == "zstd" else [changed])):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"0\.tar: (damaged or )?cut off"):
            build_index(expand([str(path)]), tmp_path, limits)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            b"\x04\x22\x4d\x18",
            "compressed with lz4, which is not read; compress it anew with one of gzip, zstd",
        ),
        (b"\x1f\x9d\x90", "compressed with compress, which is not read"),
        (b"PK\x03\x04", "it looks like a zip file"),
        (b"<!DOCTYPE html>", "it looks like an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1", "it looks like a Git LFS pointer"),
        (b"\xff\xd8\xff\xe0", "it looks like JPEG image"),
    ],
)
def test_what_is_no_tar_is_called_by_its_name(
    tmp_path: Path, limits: CacheLimits, start: bytes, message: str
) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(start + b"\n" * 2000)
    with pytest.raises(UserError, match=message):
        build_index(expand([str(path)]), tmp_path, limits)


@pytest.mark.parametrize("name", ["BZhfoo.png", "].png", "]", "\x1f.png"])
def test_a_member_whose_name_begins_like_a_compressed_file(
    tmp_path: Path, limits: CacheLimits, name: str
) -> None:
    write_members(tmp_path / "0.tar", [(name, b"x"), ("a.png", encoded(picture(1))), ("a.cls", b"0")])
    assert build_index(expand([str(tmp_path)]), tmp_path, limits)[1].used == 1


def test_files_of_a_folder_are_accounted_for(tmp_path: Path, plain: bytes) -> None:
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    (folder / "empty").mkdir()
    for name in ("0.tar", "1.TAR", "2.tar.bz2", "._0.tar", ".0.tar.partial", "old.bak", "more/3.tar"):
        (folder / name).write_bytes(plain)
    (folder / "x.gz").write_bytes(gzip.compress(plain))
    for name in ("README.md", "0.idx", "index.json", "left-out.txt"):
        (folder / name).write_bytes(b"x")
    findings = Findings()
    shards = expand([str(folder)], None, findings)
    assert [shard.name for shard in shards] == ["0.tar", "1.TAR", "2.tar.bz2"]
    assert sorted(finding.name for finding in findings.left_out) == ["more/", "old.bak", "x.gz"]
    assert sorted(finding.name for finding in findings.passed_over) == [
        ".0.tar.partial",
        "._0.tar",
        "README.md",
        "empty/",
    ]


def test_a_folder_of_tars_under_other_names(tmp_path: Path, plain: bytes) -> None:
    for n in range(3):
        (tmp_path / f"in/part.{n:05d}").parent.mkdir(exist_ok=True)
        (tmp_path / f"in/part.{n:05d}").write_bytes(plain)
    (tmp_path / "in/notes.doc").write_bytes(b"x" * 1000)
    findings = Findings()
    assert [s.name for s in expand([str(tmp_path / "in")], None, findings)] == [
        f"part.{n:05d}" for n in range(3)
    ]
    assert [finding.line() for finding in findings.passed_over] == ["notes.doc: a file that is no tar"]
    (tmp_path / "in/0.tar").write_bytes(plain)
    with pytest.raises(UserError, match=r"no shards in this folder; .*; its folder in has some"):
        expand([str(tmp_path)])
