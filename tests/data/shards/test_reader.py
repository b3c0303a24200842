"""Shards and index are readable by plain webdataset, reproducible, and checked before they are used."""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import re
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from resnet_dist.data.prepare.sources import Item, Source, open_source
from resnet_dist.data.prepare.split import prepare
from resnet_dist.data.prepare.write import PrepareOptions
from resnet_dist.data.shards import reader as reader_module
from resnet_dist.data.shards.index import IndexMismatch, check_shards, read_index
from resnet_dist.data.shards.offsets import idx_path, read_idx
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.errors import UserError

NO_CACHE = CacheLimits(Path("/nowhere"), 1, 1.0)  # plain tars on this machine are not cached


def checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves tars open
def test_plain_webdataset_reads_what_the_reader_reads(digits_data: Path) -> None:
    index = read_index(digits_data / "eval")
    reader = ShardReader(index, NO_CACHE)
    urls = [shard.url for shard in index.shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(theirs) == index.num_samples == 360
    for sample_id, sample in enumerate(theirs):
        ours = reader.read(sample_id)
        assert (ours.image, ours.label) == (sample["png"], int(sample["cls"]))
        assert reader.key(sample_id).endswith("/" + sample["__key__"])
    gc.collect()


def test_offsets_point_at_members(digits_data: Path) -> None:
    shard = read_index(digits_data / "train").shards[3]
    with tarfile.open(shard.url) as tar:
        theirs = [(info.name, info.offset_data, info.size) for info in tar]
    ours = [(m.name, m.offset, m.size) for members in read_idx(idx_path(Path(shard.url))) for m in members]
    assert ours == theirs


def test_same_source_and_seed_give_the_same_bytes(digits_data: Path, tmp_path: Path) -> None:
    prepare(open_source("digits"), tmp_path / "again")
    prepare(open_source("digits"), tmp_path / "other", PrepareOptions(seed=1))
    assert checksums(tmp_path / "again") == checksums(digits_data)
    assert checksums(tmp_path / "other") != checksums(digits_data)


def test_interrupted_prepare_leaves_nothing_half_written_and_is_resumed(
    digits_data: Path, tmp_path: Path
) -> None:
    source = open_source("digits")
    calls = itertools.count()

    def interrupted(item: Item) -> bytes:
        if next(calls) > 900:
            raise KeyboardInterrupt
        return item.read()

    items = [replace(item, read=partial(interrupted, item)) for item in source.splits["train"]]
    with pytest.raises(KeyboardInterrupt):
        prepare(Source("digits", source.classes, {"train": items}), tmp_path)
    left = checksums(tmp_path)
    assert not [name for name in left if "partial" in name]
    whole = checksums(digits_data)
    finished = {name: value for name, value in left.items() if ".plan" not in name and ".lock" not in name}
    assert finished
    assert finished.items() <= whole.items()
    assert "train/index.json" not in finished
    prepare(source, tmp_path)
    assert checksums(tmp_path) == whole


def truncate(folder: Path) -> None:
    path = next(folder.glob("*000002.tar"))
    path.write_bytes(path.read_bytes()[:-1000])


def exchange(folder: Path) -> None:
    """Replace a tar by another one of the same size."""
    path = next(folder.glob("*000002.tar"))
    data = path.read_bytes()
    path.write_bytes(data[1024:2048] + data[:1024] + data[2048:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: next(folder.glob("*000002.tar")).unlink(), "000002.tar: missing"),
        (truncate, "000002.tar: has"),
        (exchange, "000002.tar: has sha256:"),
        (lambda folder: (folder / "index.json").write_text("{}"), "index.json: not an index"),
        (lambda folder: (folder / "index.json").unlink(), "index.json: no such index"),
    ],
)
def test_damage_is_found_and_named(
    digits_data: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "train"
    shutil.copytree(digits_data / "train", folder)
    check_shards(read_index(folder))
    damage(folder)
    with pytest.raises(IndexMismatch) as caught:
        check_shards(read_index(folder))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def write_image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 5, 3), shade, np.uint8)).save(path)


def test_image_folder_keeps_bytes_and_splits(tmp_path: Path) -> None:
    for number in range(10):
        write_image(tmp_path / "in/train" / "ab"[number % 2] / f"{number}.JPG", 10 * number)
    write_image(tmp_path / "in/test/b/x.png", 200)
    indexes = prepare(open_source(str(tmp_path / "in")), tmp_path / "out", PrepareOptions(shards=3))
    assert (indexes["train"].num_samples, indexes["eval"].num_samples) == (10, 1)
    assert indexes["train"].classes == ("a", "b")
    reader = ShardReader(indexes["train"], NO_CACHE)
    found = {(reader.read(i).image, reader.read(i).label) for i in range(10)}
    files = (tmp_path / "in/train").rglob("*.JPG")
    assert found == {(path.read_bytes(), "ab".index(path.parent.name)) for path in files}


def test_image_folder_without_splits_holds_out_a_fifth(tmp_path: Path) -> None:
    for number in range(20):
        write_image(tmp_path / "ab"[number % 2] / f"{number}.png", number)
    splits = open_source(str(tmp_path)).splits
    assert (len(splits["train"]), len(splits["eval"])) == (16, 4)


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither"):
        open_source("no-such-set")
    with pytest.raises(UserError, match="no images"):
        open_source(str(tmp_path))
    write_image(tmp_path / "train/a/1.png", 1)
    write_image(tmp_path / "test/c/1.png", 1)
    with pytest.raises(UserError, match=r"\['c'\]"):
        open_source(str(tmp_path))


def test_names_of_many_bad_samples_are_read_once(digits_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader(read_index(digits_data / "train"), NO_CACHE)
    reads, original = [], reader_module.load_members

    def counted(*arguments: object) -> object:
        reads.append(arguments[2])
        return original(*arguments)

    reader.read(0)
    reader.read(1000)
    monkeypatch.setattr(reader_module, "load_members", counted)
    names = [reader.key(sample_id) for sample_id in (0, 1000, 1, 1001) * 20]
    assert len(reads) == 2
    assert len(set(names)) == 4


@pytest.mark.parametrize(("allowed", "max_open"), [(256, 64), (2, 1), (1_048_576, 256), (-1, 256)])
def test_open_files_leave_descriptors_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, allowed: int, max_open: int
) -> None:
    monkeypatch.setattr(reader_module.resource, "getrlimit", lambda kind: (allowed, allowed))
    assert reader_module._max_open_files() == max_open


@pytest.mark.parametrize("content", ["v1.2 3\nx\n", "v1.2 0\n", "0\t0\n1\t1536\n", "", None])
def test_an_idx_that_does_not_fit_is_not_trusted(
    digits_data: Path, tmp_path: Path, content: str | None
) -> None:
    """The tar is the one that was indexed, by its checksum: then its own headers count. None: a folder."""
    folder = tmp_path / "train"
    shutil.copytree(digits_data / "train", folder)
    idx = next(folder.glob("*000002.idx"))
    idx.unlink()
    if content is None:
        idx.mkdir()
    else:
        idx.write_text(content)
    index = read_index(folder)
    check_shards(index)
    reader, whole = ShardReader(index, NO_CACHE), ShardReader(read_index(digits_data / "train"), NO_CACHE)
    first = sum(index.counts[:2])
    assert [reader.read(i) for i in range(first, first + 20)] == [
        whole.read(i) for i in range(first, first + 20)
    ]


@pytest.mark.parametrize("name", ["index.json", "000002.tar"])
def test_a_folder_where_a_file_should_be_is_named(digits_data: Path, tmp_path: Path, name: str) -> None:
    """A folder stands in for a file without read permission, which root could read."""
    folder = tmp_path / "train"
    shutil.copytree(digits_data / "train", folder)
    path = next(folder.glob(f"*{name}"))
    path.unlink()
    path.mkdir()
    index = folder / "index.json"
    if name.endswith("tar"):  # without a known size, or the size would be compared first
        index.write_text(re.sub(r'"filesize": \d+', '"filesize": 0', index.read_text()))
    with pytest.raises(IndexMismatch, match=rf"{name}: cannot be read: Is a directory"):
        check_shards(read_index(folder))


def test_threads_that_share_one_open_file(digits_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = read_index(digits_data / "train")
    expected = [ShardReader(index, NO_CACHE).read(i).image for i in range(0, 1437, 7)]
    with ThreadPoolExecutor(8) as pool:
        monkeypatch.setattr(reader_module, "MAX_OPEN_FILES", 1)
        monkeypatch.setattr(reader_module, "MAX_TABLES", 1)
        reader = ShardReader(index, NO_CACHE)
        assert list(pool.map(lambda i: reader.read(i).image, range(0, 1437, 7))) == expected
    assert all(Image.open(io.BytesIO(data)).size == (8, 8) for data in expected)
