"""Shards with an index as a source of `prepare`: the same samples, labels and classes come out, and nothing is lost in silence."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import webdataset

from resnet_dist.data.prepare.indexed import OTHER_MEMBER
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare, prepare_splits
from resnet_dist.data.prepare.write import PrepareOptions
from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import Index, Shard, read_index, write_index
from resnet_dist.data.shards.names import expand
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.errors import UserError
from tests.data.prepare.trees import image, write, write_classes

LIMITS = CacheLimits(Path("/nowhere"), 1, 1.0)


def samples(index: Index) -> Counter[tuple[bytes, str]]:
    """Return the bytes and the class of every sample, in any order."""
    reader = ShardReader(index, LIMITS)
    raw = [reader.read(number) for number in range(index.num_samples)]
    return Counter((sample.image, index.classes[sample.label]) for sample in raw)


def test_both_splits_of_a_prepared_folder_are_written_anew(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_classes(tmp_path / "in" / split, cat=5, dog=9)
    first = prepare(open_source(str(tmp_path / "in")), tmp_path / "once")
    again = prepare(open_source(str(tmp_path / "once")), tmp_path / "twice", PrepareOptions(seed=1, shards=2))
    assert {split: samples(index) for split, index in again.items()} == {
        split: samples(index) for split, index in first.items()
    }
    assert [index.classes for index in again.values()] == [("cat", "dog")] * 2
    assert [len(index.shards) for index in again.values()] == [2, 2]


def test_an_index_needs_the_name_of_its_split(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", a=4)
    prepare(open_source(str(tmp_path / "in"), whole_split="train"), tmp_path / "once")
    for source in (tmp_path / "once/train", tmp_path / "once/train/index.json"):
        with pytest.raises(UserError, match="is an index of one split; pass --split train or --split eval"):
            open_source(str(source))
        opened = open_source(str(source), whole_split="eval")
        assert list(opened.splits) == ["eval"]
        assert len(opened.splits["eval"]) == 4
    assert list(open_source(str(tmp_path / "once")).splits) == ["train"]


def test_the_names_of_shards_are_plain(tmp_path: Path) -> None:
    """Braces and stars of a folder's name would be read as a pattern of shards."""
    write_classes(tmp_path / "in", a=4)
    odd = tmp_path / "v1.2 {0..3}*"
    prepare(open_source(str(tmp_path / "in"), whole_split="train"), odd)
    for name, expected in ((str(odd), "v1-2-0-3-"), (f"{odd}/train/index.json", "index-")):
        source = open_source(name, whole_split="train")
        again = prepare(source, tmp_path / expected, PrepareOptions(shards=1))["train"]
        assert again.shards[0].name == f"{expected}train-000000.tar"
        assert sum(samples(again).values()) == 4


def foreign(folder: Path) -> Index:
    """Return the index of a tar of another program: labels by name, a caption, a sample without a label, a bad label."""
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "0", "png": image(0), "cls": b"dog", "txt": b"a caption"})
        writer.write({"__key__": "1", "png": image(1), "json": b'{"label": 0}'})
        writer.write({"__key__": "2", "png": image(2)})
        writer.write({"__key__": "3", "png": image(3), "cls": b"horse"})
        writer.write({"__key__": "4", "cls": b"0"})
    index, _ = build_index(expand([str(folder)]), folder, LIMITS, classes=["cat", "dog"])
    return index


def test_members_and_samples_that_are_not_written_are_counted(tmp_path: Path) -> None:
    foreign(tmp_path / "in")
    source = open_source(str(tmp_path / "in"), whole_split="train")
    done = prepare_splits(source, tmp_path / "out", PrepareOptions(allow_empty=True))["train"]
    assert samples(done.index) == Counter({(image(0), "dog"): 1, (image(1), "cat"): 1})
    assert {(f.name, f.kind) for f in done.findings.passed_over} == {("a.tar/0.txt", OTHER_MEMBER)}
    assert {(f.name, f.kind) for f in done.findings.left_out} == {
        ("a.tar/2", "a sample without a label"),
        ("a.tar/3", "a sample without a usable label"),
        ("a.tar/4", "a sample without an image"),
    }


def test_shards_that_are_not_plain_tars_here_are_refused(tmp_path: Path) -> None:
    write_index(tmp_path / "in", [Shard("https://host/a.tar", 10, "", 1)], ["a"])
    with pytest.raises(UserError, match=r"https://host/a.tar is no uncompressed tar on this machine"):
        open_source(str(tmp_path / "in"), whole_split="train")


def test_classes_that_differ_are_refused(tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("eval", "b")):
        write_classes(tmp_path / split, **{name: 2})
        prepare(open_source(str(tmp_path / split), whole_split=split), tmp_path / "out")
    with pytest.raises(
        UserError, match="classes of train and eval are not the same: .*label 0 is 'a' and 'b'"
    ):
        open_source(str(tmp_path / "out"))


def test_a_changed_or_missing_shard_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", a=4)
    index = prepare(open_source(str(tmp_path / "in"), whole_split="train"), tmp_path / "out")["train"]
    Path(index.shards[0].url).unlink()
    with pytest.raises(UserError, match="missing, but .*index.json lists it"):
        open_source(str(tmp_path / "out"))


def test_an_index_json_of_something_else_in_a_folder_of_images(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", a=4)
    write(tmp_path / "in/index.json", json.dumps({"a": 1}).encode())
    source = open_source(str(tmp_path / "in"), whole_split="train")
    assert len(source.splits["train"]) == 4


def test_a_sample_cut_off_since_is_left_out(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", a=4)
    index = prepare(
        open_source(str(tmp_path / "in"), whole_split="train"), tmp_path / "out", PrepareOptions(shards=1)
    )["train"]
    source = open_source(str(tmp_path / "out"))
    path = Path(index.shards[0].url)
    with tarfile.open(path) as tar:
        start = max(member.offset_data for member in tar.getmembers() if member.name.endswith(".png"))
    path.write_bytes(path.read_bytes()[: start + 20])
    done = prepare_splits(source, tmp_path / "again")["train"]
    assert (done.findings.used, done.findings.num_left_out) == (3, 1)
    assert read_index(tmp_path / "again/train").num_samples == 3
