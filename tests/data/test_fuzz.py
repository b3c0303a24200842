"""Damaged tars, images and index files: no crash, no hang, no memory without end, and nothing lost in silence."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import features
from webdataset.tariterators import base_plus_ext, group_by_keys

from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import IndexMismatch, read_index
from resnet_dist.data.shards.labels import parse_label
from resnet_dist.data.shards.members import KEY_AND_EXTENSION, WEBDATASET
from resnet_dist.data.shards.names import expand
from resnet_dist.data.shards.offsets import read_idx
from resnet_dist.data.shards.reader import BadSample, ShardReader
from resnet_dist.data.shards.tar import TarError, group_samples
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.errors import UserError
from tests.data.conftest import decode_image, encoded, picture, write_shards, write_tar

NUM_IMAGES, NUM_TARS, NUM_INDEXES, NUM_IDX_FILES = 9000, 6000, 3000, 2000  # 20,000 damaged files in all
MAX_GROWTH_BYTES = 700 * 2**20  # the growth of the process in one test; the largest image takes 240 MB


def damaged(content: bytes, generator: random.Random) -> bytes:
    """Damage the content one to three times: flip a bit, or set, cut off, remove, double or zero some bytes."""
    data = bytearray(content)
    for _ in range(generator.randint(1, 3)):
        if not data:
            break
        at = generator.randrange(len(data))
        length = generator.choice([1, 4, 64, 512, 1000])
        match generator.randrange(6):
            case 0:
                data[at] ^= 1 << generator.randrange(8)
            case 1:
                data[at : at + length] = generator.randbytes(min(length, len(data) - at))
            case 2:
                del data[at:]
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                data[at : at + length] = bytes(min(length, len(data) - at))
    return bytes(data)


CLEAR_PEAK = Path("/proc/self/clear_refs")  # Linux: writing 5 resets VmHWM to VmRSS


def memory(field: str) -> int:
    """Return the memory of this process in bytes. field: VmRSS, its memory now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.fixture(autouse=True)
def memory_stays_bounded() -> Iterator[None]:
    """Limit the memory that one test adds. Resets the peak first, because an earlier test may have taken more."""
    if not CLEAR_PEAK.exists():
        yield
        return
    CLEAR_PEAK.write_text("5")
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before < MAX_GROWTH_BYTES


@pytest.mark.skipif(not CLEAR_PEAK.exists(), reason="needs Linux")
def test_the_memory_guard_sees_a_test_even_when_an_earlier_one_took_more() -> None:
    np.ones(MAX_GROWTH_BYTES // 4, np.uint8).sum()
    CLEAR_PEAK.write_text("5")
    before = memory("VmRSS")
    assert memory("VmHWM") - before < MAX_GROWTH_BYTES // 100
    np.ones(MAX_GROWTH_BYTES // 8, np.uint8).sum()
    assert MAX_GROWTH_BYTES // 10 < memory("VmHWM") - before < MAX_GROWTH_BYTES // 6


def originals() -> list[bytes]:
    pixels = np.kron(picture(1, 6), np.ones((8, 8, 1), np.uint8))
    forms: list[tuple[str, dict[str, object]]] = [
        ("jpeg", {}),
        ("jpeg", {"progressive": True}),
        ("jpeg", {"subsampling": 0, "quality": 99}),
        ("png", {}),
        ("webp", {}),
        ("bmp", {}),
        ("gif", {}),
        ("tiff", {}),
        ("tiff", {"compression": "tiff_lzw"}),
        ("ppm", {}),
        *([("jpeg2000", {})] if features.check("jpg_2000") else []),
        *([("avif", {})] if features.check("avif") else []),
    ]
    return [encoded(pixels, form, **options) for form, options in forms]


@pytest.mark.filterwarnings("ignore")  # Pillow warns of much that it then refuses
def test_damaged_images_decode_or_are_refused() -> None:
    outcomes: Counter[str] = Counter()
    files = originals()
    for number in range(NUM_IMAGES):
        generator = random.Random(number)
        data = damaged(files[number % len(files)], generator)
        try:
            pixels = decode_image(data, 1 + 2 * (number % 2))
        except ValueError:
            outcomes["refused"] += 1
        else:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            outcomes["decoded"] += 1
    assert min(outcomes.values()) > NUM_IMAGES // 10  # both outcomes occurred


def samples_in(content: bytes, name: str) -> dict[str, tuple[bytes | None, bytes | None]]:
    """Return image and label bytes by key, as our reader finds them."""
    return {
        members[0].key: tuple(  # type: ignore[misc]
            content[m.offset : m.offset + m.size] if m else None
            for m in (WEBDATASET.image(members), WEBDATASET.label(members))
        )
        for members in group_samples(io.BytesIO(content), name)
    }


def test_damaged_tars_are_refused_or_hold_every_sample(tmp_path: Path) -> None:
    """In a tar that is accepted, only names or contents may differ from what was written: no header is lost."""
    whole = tmp_path / "whole.tar"
    write_tar(whole, range(6))
    content = whole.read_bytes()
    expected, outcomes = samples_in(content, whole.name), Counter[str]()
    for number in range(NUM_TARS):
        data = damaged(content, random.Random(number))
        try:
            found = samples_in(data, "damaged.tar")
        except TarError as error:
            assert "damaged.tar" in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["accepted"] += 1
        if data.count(b"ustar") >= 12 and len(data) >= len(content):
            assert len(found) >= len(expected)
    assert min(outcomes.values()) > NUM_TARS // 10


@pytest.mark.parametrize("cut", range(1, 27))
def test_a_tar_cut_anywhere_is_refused(tmp_path: Path, cut: int) -> None:
    """webdataset and tarfile silently lose the samples behind a cut inside a header."""
    path = tmp_path / "cut.tar"
    write_tar(path, range(6))
    with path.open("rb") as file:
        last = list(group_samples(file, "x"))[-1][-1]
    content = path.read_bytes()
    end = last.offset + last.size
    path.write_bytes(content[: end * cut // 26])
    with path.open("rb") as file, pytest.raises(TarError, match="cut"):
        list(group_samples(file, "cut.tar"))


def test_a_damaged_set_trains_or_is_refused(tmp_path: Path) -> None:
    """Through index and reader, a sample is either read as it was indexed, or bad and named."""
    limits = CacheLimits(tmp_path / "cache", 1, 1.0)
    for number in range(60):
        folder = tmp_path / str(number)
        names = write_shards(folder, (5, 4))
        path = Path(names[number % 2])
        path.write_bytes(damaged(path.read_bytes(), random.Random(number)))
        try:
            index, _ = build_index(expand(names), folder, limits)
        except UserError as error:
            assert "part-0000" in str(error)
            assert not (folder / "index.json").exists()
            continue
        reader = ShardReader(index, limits)
        for sample_id in range(index.num_samples):
            try:
                reader.read(sample_id)
            except BadSample:
                assert reader.key(sample_id).startswith("part-0000")
        reader.close()


def test_damaged_index_files_are_refused_or_read(tmp_path: Path) -> None:
    limits = CacheLimits(tmp_path / "cache", 1, 1.0)
    index, _ = build_index(expand(write_shards(tmp_path, (5, 4))), tmp_path, limits)
    content, path = Path(index.location).read_bytes(), tmp_path / "damaged.json"
    outcomes: Counter[str] = Counter()
    for number in range(NUM_INDEXES):
        path.write_bytes(damaged(content, random.Random(number)))
        try:
            found = read_index(path)
            assert all(shard.num_samples >= 0 for shard in found.shards)
            outcomes["read"] += 1
        except IndexMismatch as error:
            assert "damaged.json" in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > NUM_INDEXES // 20


def test_damaged_idx_files_are_refused_or_read(tmp_path: Path) -> None:
    write_shards(tmp_path, (9,))
    limits = CacheLimits(tmp_path / "cache", 1, 1.0)
    index, _ = build_index(expand([str(tmp_path)]), tmp_path, limits)
    idx = next(tmp_path.glob("*.idx"))
    content, outcomes = idx.read_bytes(), Counter[str]()
    for number in range(NUM_IDX_FILES):
        idx.write_bytes(damaged(content, random.Random(number)))
        reader = ShardReader(index, limits)
        try:
            read_idx(idx)
            for sample_id in range(9):
                try:
                    reader.read(sample_id)
                    outcomes["read"] += 1
                except BadSample:
                    outcomes["bad"] += 1
        except (TarError, IndexMismatch) as error:
            assert ".idx" in str(error) or "samples" in str(error)
            outcomes["refused"] += 1
        reader.close()
    assert min(outcomes["read"], outcomes["refused"]) > NUM_IDX_FILES // 20


NAMES = st.text(st.sampled_from("ab./_ -\\é\n"), min_size=1, max_size=24)


@given(NAMES)
def test_keys_and_extensions_are_those_of_webdataset(name: str) -> None:
    match = KEY_AND_EXTENSION.match(name)
    assert (match.groups() if match else (None, None)) == base_plus_ext(name)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "d/a", "../x", "/etc/p", ".h", "a.b"]),
            st.sampled_from(["jpg", "cls", "seg.PNG", "json", ""]),
            st.binary(max_size=20),
        ),
        max_size=12,
    )
)
def test_any_names_group_as_webdataset_groups_them(members: list[tuple[str, str, bytes]]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key, extension, payload in members:
            info = tarfile.TarInfo(f"{key}.{extension}" if extension else key)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    files = webdataset.tariterators.tar_file_expander(
        [{"url": "x.tar", "stream": io.BytesIO(buffer.getvalue())}]
    )
    try:
        theirs = [{key for key in sample if not key.startswith("__")} for sample in group_by_keys(files)]
    except ValueError:  # raised for a member that appears twice in one sample
        with pytest.raises(TarError, match="twice"):
            list(group_samples(buffer, "x.tar"))
        return
    ours = [{member.extension for member in sample} for sample in group_samples(buffer, "x.tar")]
    assert ours == theirs


def test_names_that_climb_out_of_the_folder_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "in/evil.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name in ("../../climb.png", "../../climb.cls", "/tmp/absolute.png", "link.png"):
            info = tarfile.TarInfo(name)
            content = b"0" if name.endswith("cls") else encoded(picture(1))
            info.size = len(content)
            if name.startswith("link"):
                info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(info, io.BytesIO(content))
    before = set(tmp_path.rglob("*"))
    limits = CacheLimits(tmp_path / "cache", 1, 1.0)
    index, findings = build_index(expand([str(path)]), path.parent, limits, classes=["a"])
    assert index.num_samples == 2
    assert {finding.name for finding in findings.left_out} == {"evil.tar//tmp/absolute", "evil.tar/link.png"}
    new = {p.name for p in set(tmp_path.rglob("*")) - before}
    assert new <= {"index.json", "evil.idx", "left-out.txt", "cache"}


@pytest.mark.parametrize(
    ("text", "is_json", "label"),
    [
        (b"7", False, 7),
        (b" 12\n", False, 12),
        (b'{"label": 3}', True, 3),
        (b'{"cls": 4, "width": 9}', True, 4),
        (b"", False, None),
        (b"cat", False, None),
        (b'{"label": "cat"}', True, None),
        (b'{"label": true}', True, None),
        (b"[1]", True, None),
        (b"[" * 100_000, True, None),
        (b"9" * 5000, False, None),
        (b"\xff\xfe", True, None),
    ],
)
def test_labels(text: bytes, is_json: bool, label: int | None) -> None:
    if label is not None:
        assert parse_label(text, is_json=is_json) == label
        return
    with pytest.raises(ValueError, match="label|number|read|object"):
        parse_label(text, is_json=is_json)


def test_an_index_that_lies(tmp_path: Path) -> None:
    limits = CacheLimits(tmp_path / "cache", 1, 1.0)
    index, _ = build_index(expand(write_shards(tmp_path, (5,))), tmp_path, limits)
    value = json.loads(Path(index.location).read_text())
    lies: list[Callable[[dict[str, object]], object]] = [
        lambda entry: entry.update(nsamples=6),
        lambda entry: entry.update(nsamples=10**12),
        lambda entry: entry.update(nsamples=-1),
        lambda entry: entry.update(url="../../../etc/passwd"),
    ]
    for lie in lies:
        entry = dict(value["shardlist"][0])
        lie(entry)
        (tmp_path / "lie.json").write_text(json.dumps(value | {"shardlist": [entry]}))
        with pytest.raises((IndexMismatch, OSError)):
            ShardReader(read_index(tmp_path / "lie.json"), limits).read(0)
