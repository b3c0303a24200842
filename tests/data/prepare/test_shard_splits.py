"""Shards as a source of `prepare`: both splits are found by their names, and no half is passed over in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.config import Data
from resnet_dist.data.findings import Findings
from resnet_dist.data.prepare.shard_splits import OTHER_FOLDER
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare
from resnet_dist.data.prepare.write import PrepareOptions
from resnet_dist.data.shards.index import INDEX_NAME
from resnet_dist.errors import UserError
from resnet_dist.predict.inputs import inputs_of
from tests.data.prepare.trees import image, write, write_classes


def write_shards(folder: Path, number: int = 4) -> None:
    """Write a folder of shards with an index, of two classes."""
    images = write_classes(folder.with_name(f".{folder.name}"), a=number, b=number)
    out = folder.with_name(f".{folder.name}.out")
    prepare(open_source(str(images), whole_split="train"), out, PrepareOptions(shards=1))
    (out / "train").rename(folder)


def counts(folder: Path, split: str | None = None, output: Path | None = None) -> dict[str, int]:
    source = open_source(str(folder), whole_split=split, output=output)
    return {name: len(items) for name, items in source.splits.items()}


@pytest.mark.parametrize(
    ("train", "evaluation"), [("train", "val"), ("Training", "eval"), ("train", "test_set")]
)
def test_the_splits_of_shards_have_the_names_of_those_of_images(
    tmp_path: Path, train: str, evaluation: str
) -> None:
    write_shards(tmp_path / train, 4)
    write_shards(tmp_path / evaluation, 2)
    assert counts(tmp_path) == {"train": 8, "eval": 4}
    assert counts(tmp_path, "eval") == {"eval": 4}
    assert not open_source(str(tmp_path)).findings[""].left_out


@pytest.mark.parametrize(
    ("indexed", "other", "split"), [("train", "val", "train"), ("eval", "Training", "eval")]
)
def test_a_half_without_an_index_is_refused(tmp_path: Path, indexed: str, other: str, split: str) -> None:
    write_shards(tmp_path / indexed)
    write_classes(tmp_path / other, a=2, b=2)
    missing = "eval" if split == "train" else "train"
    for wanted in (None, missing):
        with pytest.raises(
            UserError,
            match=f"{indexed}/ holds shards with an index, but {other}/ beside it has none; "
            f"`resnet-dist prepare .*/{other} OUT --split {missing}` .* --split {split} takes {indexed}/ alone",
        ):
            open_source(str(tmp_path), whole_split=wanted)
    assert counts(tmp_path, split) == {split: 8}


def test_a_half_of_shards_without_an_index_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    for name in ("train", "val"):
        write_shards(tmp_path / name)
    (tmp_path / "val" / INDEX_NAME).unlink()
    with pytest.raises(UserError, match="val/ beside it has none; `resnet-dist index .*/val` makes one"):
        open_source(str(tmp_path))
    (tmp_path / "train" / INDEX_NAME).unlink()
    with pytest.raises(
        UserError, match="/train: holds tars, but no index; `resnet-dist index .*/train` makes"
    ):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match="/val: holds tars, but no index"):
        open_source(str(tmp_path / "val"), whole_split="eval")


def test_a_preparation_that_has_not_ended_is_no_source(tmp_path: Path) -> None:
    write_shards(tmp_path / "train")
    write(tmp_path / "eval/.plan.json", b"{}")
    repeat = "has begun to write it and has not ended; repeat that call"
    with pytest.raises(UserError, match=f"eval/ beside it has none; .* {repeat}"):
        open_source(str(tmp_path))
    # An index of these shards alone would lose those that are missing.
    write(tmp_path / "eval/digits-eval-000000.tar", b"x")
    with pytest.raises(UserError, match=f"eval/ beside it has none; .* {repeat}"):
        open_source(str(tmp_path))
    (tmp_path / "train" / INDEX_NAME).rename(tmp_path / "train/.plan.json")
    for path, split in ((tmp_path, None), (tmp_path / "eval", "eval")):
        with pytest.raises(UserError, match=f"holds tars, but no index; .* {repeat}"):
            open_source(str(path), whole_split=split)


def test_an_empty_folder_and_the_output_are_no_half(tmp_path: Path) -> None:
    write_shards(tmp_path / "train")
    write(tmp_path / "val/.DS_Store")
    write(tmp_path / "val/.gitkeep")
    write_shards(tmp_path / "eval")
    (tmp_path / "eval").rename(tmp_path / "test")
    assert counts(tmp_path, output=tmp_path / "test") == {"train": 8}


def test_other_folders_of_splits_are_counted(tmp_path: Path) -> None:
    for name in ("train", "val"):
        write_shards(tmp_path / name)
    write_classes(tmp_path / "test", a=3)
    write_classes(tmp_path / "raw", a=3)
    source = open_source(str(tmp_path))
    (found,) = source.findings[""].left_out
    assert (found.name, found.kind, found.count) == ("test/", OTHER_FOLDER, 3)
    assert not open_source(str(tmp_path), whole_split="train").findings[""].left_out
    write_shards(tmp_path / "Train")
    with pytest.raises(UserError, match="Train/ and train/ all look like the training split"):
        open_source(str(tmp_path))


def test_an_archive_beside_images_is_no_set_of_shards(tmp_path: Path) -> None:
    for name in ("train", "val"):
        write_classes(tmp_path / name, a=2, b=2)
        write(tmp_path / name / "all.tar", b"x")
    write(tmp_path / "all.tar", b"x")
    write(tmp_path / "test/all.tar", b"x")
    assert counts(tmp_path) == {"train": 4, "eval": 4}


def test_a_class_with_the_name_of_a_split_may_have_an_archive(tmp_path: Path) -> None:
    for name in ("plane", "train"):
        write(tmp_path / name / "0.JPEG", image(0, "jpeg"))
        write(tmp_path / name / "1.JPEG", image(1, "jpeg"))
        write(tmp_path / name / "all.tar", b"x")
    source = open_source(str(tmp_path))
    assert source.classes == ("plane", "train")


def test_a_source_that_is_none_names_shards_and_their_command(tmp_path: Path) -> None:
    for name in ("no-such-set", "s3://bucket/shards"):
        with pytest.raises(
            UserError,
            match="neither a known data set .* nor a folder on this machine: of images, or of shards with an index, which "
            "`resnet-dist index` makes",
        ):
            open_source(name)
    write(tmp_path / "0.png", image())
    with pytest.raises(UserError, match="no images; expected one folder per class"):
        open_source(str(tmp_path))


def test_shards_that_the_index_does_not_list_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    write_shards(folder)
    (listed,) = folder.glob("*.tar")
    (folder / "more.tar").write_bytes(listed.read_bytes())
    source = open_source(str(folder), whole_split="train")
    assert len(source.splits["train"]) == 8
    data, findings = Data(train="a", eval="b", image_size=8, global_batch_size=8), Findings()
    assert len(list(inputs_of([str(folder)], data, findings))) == 8
    for found in (source.findings["train"], findings):
        assert [(f.name, f.kind) for f in found.left_out] == [
            ("more.tar", "a shard that the index does not list")
        ]
        assert not found.passed_over
