"""Offsets: one file per shard, never over another program's, never trusted, and where a set is moved to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from resnet_dist.data.findings import Findings
from resnet_dist.data.shards import offsets
from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import Index, check_shards, read_index, relative_name
from resnet_dist.data.shards.names import expand
from resnet_dist.data.shards.offsets import offset_files, read_idx
from resnet_dist.data.shards.output import place_of_index
from resnet_dist.data.shards.reader import RawSample, ShardReader
from resnet_dist.data.shards.verify import verify_index
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.errors import UserError
from tests.data.conftest import encoded, picture, write_members, write_shards

MXNET = b"0\t0\n1\t1536\n"
DALI_1_1 = b"v1.1 2\ncls 512 1 png 1536 200\ncls 2560 1 png 3584 200\n"
MOSAIC = b'{"shards": [{"format": "mds"}], "version": 2}'


def all_samples(index: Index, limits: CacheLimits) -> list[RawSample]:
    reader = ShardReader(index, limits)
    return [reader.read(i) for i in range(index.num_samples)]


def write_sized(path: Path, shard: int, *, same: bool = False) -> list[RawSample]:
    """Write ten samples; with `same`, names and sizes do not depend on the shard, only pixels and labels."""
    numbers = range(10) if same else range(10 * shard, 10 * shard + 10)
    images = [encoded(picture(1000 * shard + n, 8 if same else 8 + (n * 7) % 5), "bmp") for n in numbers]
    members = [
        member
        for n, image in zip(numbers, images, strict=True)
        for member in ((f"{n:04d}.cls", b"%d" % shard), (f"{n:04d}.bmp", image))
    ]
    write_members(path, members)
    return [RawSample(image, shard) for image in images]


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        [f"part.{n:05d}" for n in range(4)],
        [f"train-v1.{n}" for n in range(4)],
        ["a", "a.tar", "a.tar.bak", "a.TAR"],
    ],
)
def test_each_shard_has_a_file_of_its_own(
    tmp_path: Path, limits: CacheLimits, names: list[str], same: bool
) -> None:
    expected = [
        sample for n, name in enumerate(names) for sample in write_sized(tmp_path / name, n, same=same)
    ]
    shards = expand([str(tmp_path / name) for name in names])
    out = tmp_path / "i.json"
    for _ in range(2):
        build_index(shards, out, limits)
        index = read_index(out)
        check_shards(index)
        assert all_samples(index, limits) == expected
        assert verify_index(str(out), limits) == []
        own = {offsets.idx_path(tmp_path / name) for name in names}
        assert len(own) >= len(names) - ("a" in names)  # a and a.tar share a.idx
    shared = tmp_path / "part.idx"
    shared.write_text(offset_files(tmp_path / names[0])[-1].read_text())
    assert all_samples(index, limits) == expected


@pytest.mark.parametrize(
    "content", [MXNET, DALI_1_1, b"", b"\xff\0", b"v1.2 1\ncls 512 1 old.cls png 1536 9 old.png\n"]
)
def test_another_programs_idx_stays_and_is_not_read(
    tmp_path: Path, limits: CacheLimits, content: bytes
) -> None:
    [name] = write_shards(tmp_path, (6,))
    theirs, ours = Path(name).with_suffix(".idx"), Path(f"{name}.idx")
    theirs.write_bytes(content)
    for _ in range(2):
        index, findings = build_index(expand([name]), tmp_path, limits)
        assert findings.as_json()["passed_over"] == {
            "an .idx of another tar or program, which stays as it is": 1
        }
        assert theirs.read_bytes() == content
        assert len(read_idx(ours)) == 6
        check_shards(index)
        expected = all_samples(index, limits)
        assert verify_index(str(tmp_path), limits) == []
    ours.unlink()  # then the tar itself is read
    check_shards(index)
    assert all_samples(index, limits) == expected


def test_under_both_names_lie_foreign_files(tmp_path: Path, limits: CacheLimits) -> None:
    [name] = write_shards(tmp_path, (6,))
    both = [Path(name).with_suffix(".idx"), Path(f"{name}.idx")]
    for path in both:
        path.write_bytes(MXNET)
    index, findings = build_index(expand([name]), tmp_path, limits)
    assert findings.num_passed_over == 2
    assert [path.read_bytes() for path in both] == [MXNET, MXNET]
    assert len(read_idx(tmp_path / "index.offsets/000000.idx")) == 6
    assert len(all_samples(index, limits)) == 6


def test_an_idx_that_fits_stays_whoever_wrote_it(tmp_path: Path, limits: CacheLimits) -> None:
    [name] = write_shards(tmp_path, (6,))
    build_index(expand([name]), tmp_path, limits)
    idx = Path(name).with_suffix(".idx")
    before = idx.stat()
    _, findings = build_index(expand([name]), tmp_path, limits)
    assert (idx.stat().st_ino, findings) == (before.st_ino, Findings(used=6))
    assert not Path(f"{name}.idx").exists()


def test_a_set_of_before_that_was_indexed_anew_after_a_change(tmp_path: Path, limits: CacheLimits) -> None:
    """Our own file under the second name is replaced, and it is read before a stale one under the first."""
    [name] = write_shards(tmp_path, (6,))
    build_index(expand([name]), tmp_path, limits)
    for count in (7, 8):
        write_shards(tmp_path, (count,))
        index, _ = build_index(expand([name]), tmp_path, limits)
        assert len(read_idx(Path(f"{name}.idx"))) == count
        assert len(all_samples(index, limits)) == count
        assert len(read_idx(Path(name).with_suffix(".idx"))) == 6


def test_verify_compares_all_offsets(tmp_path: Path, limits: CacheLimits) -> None:
    """First, middle and last sample have their headers: only a comparison of all finds the others."""
    write_sized(tmp_path / "a.tar", 0, same=True)
    build_index(expand([str(tmp_path)]), tmp_path, limits)
    idx = tmp_path / "a.idx"
    lines = idx.read_text().splitlines()
    assert len(lines) == 11
    lines[2], lines[3] = (
        lines[2].replace("0001.bmp", "0002.bmp"),
        lines[3].replace("0002.bmp", "0001.bmp"),
    )
    idx.write_text("\n".join(lines) + "\n")
    assert verify_index(str(tmp_path), limits) == [
        f"{idx}: does not have the offsets of a.tar/0001; index the shards again"
    ]


def test_another_tar_of_the_same_size_is_refused_by_its_checksum(tmp_path: Path, limits: CacheLimits) -> None:
    write_sized(tmp_path / "a.tar", 0)
    index, _ = build_index(expand([str(tmp_path)]), tmp_path, limits)
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content.replace(b"0000.cls", b"9999.cls"))
    with pytest.raises(UserError, match=r"a\.tar: has sha256:.*index it again"):
        check_shards(index)


@pytest.fixture
def refuse_writing(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Make folders that cannot be written, which root could."""
    refused: list[Path] = []

    def guarded(path: Path, text: str) -> None:
        if path.parent in refused:
            raise PermissionError(13, "Permission denied", str(path))
        original(path, text)

    original = offsets.write_text_atomically
    monkeypatch.setattr(offsets, "write_text_atomically", guarded)
    return refused


@pytest.mark.parametrize("content", [None, DALI_1_1])
def test_offsets_of_a_read_only_folder_lie_beside_the_index(
    tmp_path: Path, limits: CacheLimits, refuse_writing: list[Path], content: bytes | None
) -> None:
    folder = tmp_path / "in"
    names = write_shards(folder, (5, 4))
    if content:
        Path(names[1]).with_suffix(".idx").write_bytes(content)
    refuse_writing.append(folder)
    out = tmp_path / "out/i.json"
    build_index(expand([str(folder)]), out, limits)
    index = read_index(out)
    assert sorted(path.name for path in (tmp_path / "out/i.offsets").iterdir()) == [
        "000000.idx",
        "000001.idx",
    ]
    assert {path.suffix for path in folder.iterdir()} == ({".tar", ".idx"} if content else {".tar"})
    assert index.offset_files(1)[0] == tmp_path / "out/i.offsets/000001.idx"
    check_shards(index)
    assert verify_index(str(out), limits) == []
    refuse_writing.clear()  # the folder can be written again: the files beside the index go
    build_index(expand([str(folder)]), out, limits)
    assert not list((tmp_path / "out/i.offsets").iterdir())


def test_an_index_that_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, limits: CacheLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    def refused(**options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    (tmp_path / "a.tar").write_bytes(b"no tar: it is not read")
    with pytest.raises(
        UserError, match=r"index\.json: cannot be written \(Read-only file system\); pass --out"
    ):
        build_index(expand([str(tmp_path / "a.tar")]), tmp_path, limits)


@pytest.mark.parametrize("content", [MOSAIC, b"[]", b"{", b'{"shardlist": []}'])
def test_another_programs_index_stays(tmp_path: Path, limits: CacheLimits, content: bytes) -> None:
    write_shards(tmp_path, (6,))
    theirs = tmp_path / "index.json"
    theirs.write_bytes(content)
    for _ in range(2):
        written, _ = build_index(expand([str(tmp_path)]), tmp_path, limits)
        assert theirs.read_bytes() == content
        assert read_index(tmp_path).location == written.location == str(tmp_path / "index.resnet-dist.json")
    assert verify_index(str(tmp_path), limits) == []
    with pytest.raises(UserError, match="something else than our index; give another name"):
        place_of_index(theirs)


def test_a_set_can_be_moved(tmp_path: Path, limits: CacheLimits, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "real/set/sub", (6,))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    ways = [
        ("real/set/sub", "real/set/index.json"),
        ("link/set/sub", "real/set/index.json"),
        ("real/set/sub", "link/set"),
        ("real/set/../set/sub", "./link/../link/set/index.json"),
        (str(tmp_path / "link/set/sub"), "real/set"),
        (f"file://{tmp_path}/real/set/sub/part-00000.tar", "real/set"),
    ]
    for shards, out in ways:
        build_index(expand([shards]), Path(out), limits)
        shutil.move("real/set", "moved")
        index = read_index("moved")
        assert len(all_samples(index, limits)) == 6, (shards, out)
        check_shards(index)
        (tmp_path / "moved/index.json").unlink()
        shutil.move("moved", "real/set")


def test_names_in_an_index(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "elsewhere.tar").touch()
    (tmp_path / "set/link.tar").symlink_to(tmp_path / "elsewhere.tar")
    assert relative_name(str(tmp_path / "set/link.tar"), tmp_path / "set") == "link.tar"
    assert relative_name(str(tmp_path / "elsewhere.tar"), tmp_path / "set") == str(tmp_path / "elsewhere.tar")
    assert relative_name("s3://bucket/a.tar", tmp_path) == "s3://bucket/a.tar"
    assert relative_name(str(tmp_path / "pipe:x.tar"), tmp_path) == "./pipe:x.tar"


def test_names_that_are_not_utf8(tmp_path: Path, limits: CacheLimits) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    [name] = write_shards(folder, (3,))
    build_index(expand([str(folder)]), folder, limits)
    index = read_index(folder)
    assert len(index.digest()) == 64
    assert len(all_samples(index, limits)) == 3
    assert verify_index(str(folder), limits) == []
    far, _ = build_index(expand([name]), tmp_path / "far.json", limits)
    assert read_index(tmp_path / "far.json").shards == far.shards
