"""Splits are found under their usual names, and what can be read in two ways is refused by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.data.prepare.items import Item, Source, hold_out, hold_out_of_each_class
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.errors import UserError
from tests.data.prepare.trees import image, write, write_classes


def splits(folder: Path, **names: int) -> Path:
    """Write folders of splits, each with as many images in two classes; return the folder."""
    for name, count in names.items():
        write_classes(folder / name, a=count, b=count)
    return folder


def counts(source: Source) -> dict[str, int]:
    return {split: len(items) for split, items in source.splits.items()}


TRAIN_NAMES = ["train", "Train", "TRAIN", "Training", "train_set", "training-set", "train2017", "trainset"]
EVAL_NAMES = [
    "eval",
    "Test",
    "TESTING",
    "val",
    "Valid",
    "validation",
    "dev",
    "Val2017",
    "test_set",
    "Test-Images",
]


@pytest.mark.parametrize("train", TRAIN_NAMES)
@pytest.mark.parametrize("evaluation", EVAL_NAMES)
def test_splits_by_name(tmp_path: Path, train: str, evaluation: str) -> None:
    source = open_source(str(splits(tmp_path, **{train: 2, evaluation: 1})))
    assert counts(source) == {"train": 4, "eval": 2}
    assert source.classes == ("a", "b")
    assert source.folders == {"train": f"{train}/", "eval": f"{evaluation}/"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"Train": 1, "train": 1, "test": 1}, "Train/ and train/ all look like the training split"),
        ({"train": 1, "Test": 1, "test": 1}, "Test/ and test/ all look like the evaluation split"),
        ({"Training": 1}, r"has Training/ with folders of classes, but not an evaluation folder"),
        ({"VAL": 1, "other": 1}, "has VAL/ with folders of classes, but not train beside it"),
        ({"train": 1, "Valid": 0}, "Valid: no images"),
    ],
)
def test_what_is_ambiguous_or_half_is_refused(tmp_path: Path, names: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(str(splits(tmp_path, **names)))


def test_splits_without_classes_are_no_classes(tmp_path: Path) -> None:
    write_classes(tmp_path / "flat", Train=3, Test=3)
    with pytest.raises(UserError, match="Train/ and Test/ look like splits, but hold no folders of classes"):
        open_source(str(tmp_path / "flat"))
    splits(tmp_path / "half", train=2)
    write(tmp_path / "half/test/0.png", image())
    with pytest.raises(
        UserError, match=r"train/ has folders of classes, but test/ beside it has none.*--split train"
    ):
        open_source(str(tmp_path / "half"))
    source = open_source(str(tmp_path / "half"), whole_split="train")
    assert counts(source) == {"train": 4}
    assert not source.findings[""].left_out
    write_classes(tmp_path / "cifar", bus=1, train=1, car=1)  # a train is a vehicle too
    assert open_source(str(tmp_path / "cifar"), whole_split="train").classes == ("bus", "car", "train")


def test_one_of_several_evaluation_folders_is_used(tmp_path: Path) -> None:
    splits(tmp_path, train=3, val=2, test=1)
    write(tmp_path / "test/a/notes.txt", b"x")
    write(tmp_path / "annotations/0.xml", b"<?xml")
    source = open_source(str(tmp_path))
    assert counts(source) == {"train": 6, "eval": 4}
    assert source.folders["eval"] == "val/"
    (left_out,) = source.findings[""].left_out
    assert (left_out.name, left_out.kind, left_out.count) == ("test/", "a folder beside train/ and val/", 2)
    assert {(f.name, f.count) for f in source.findings[""].passed_over} == {("test/", 1), ("annotations/", 1)}


def test_splits_below_a_class_are_refused(tmp_path: Path) -> None:
    splits(tmp_path / "dataset", Train=2, Test=1)
    with pytest.raises(UserError, match="dataset: would be a class, but holds the splits Train/ and Test/"):
        open_source(str(tmp_path))


def test_classes_that_differ_between_splits_are_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", cat=1, dog=1)
    write_classes(tmp_path / "val", Cat=1, dog=1)
    with pytest.raises(
        UserError, match=r"classes \['Cat'\] have no folder in .*train.*'Cat' differs from 'cat' in case"
    ):
        open_source(str(tmp_path))


def test_a_split_has_no_samples_of_a_class_or_no_folder_for_it(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", cat=1, dog=1)
    write_classes(tmp_path / "val", dog=2)
    assert {item.label for item in open_source(str(tmp_path)).splits["eval"]} == {1}
    (tmp_path / "val/cat").mkdir()
    with pytest.raises(UserError, match="val/?: 1 of 2 classes have no samples: 'cat'"):
        open_source(str(tmp_path))


@given(labels=st.lists(st.integers(0, 6), min_size=1, max_size=120), seed=st.integers(0, 2**31))
def test_every_class_is_held_out(labels: list[int], seed: int) -> None:
    items = [Item(label, "png", bytes, str(number)) for number, label in enumerate(labels)]
    divided = hold_out_of_each_class(items, seed)
    assert divided == hold_out_of_each_class(items, seed)
    assert sorted(int(item.name) for part in divided.values() for item in part) == list(range(len(items)))
    train, evaluation = (Counter(item.label for item in divided[split]) for split in ("train", "eval"))
    for label, count in Counter(labels).items():
        assert train[label] >= 1
        assert (evaluation[label] >= 1) == (count >= 2)
        assert abs(evaluation[label] - count / 5) <= 1


def test_the_digits_keep_the_split_of_version_0_3_0() -> None:
    digits = open_source("digits").splits
    assert [item.name for item in digits["eval"][:5]] == [f"digit {n}" for n in (0, 2, 3, 9, 10)]
    everything = sorted((*digits["train"], *digits["eval"]), key=lambda item: int(item.name.split()[1]))
    expected = hold_out(everything, 0)
    assert {split: list(items) for split, items in digits.items()} == expected
    assert (len(digits["train"]), len(digits["eval"])) == (1437, 360)
