"""Labels as people store them: numbers and names of classes are read, everything else is refused with what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resnet_dist.data.shards.build import IndexOptions, build_index
from resnet_dist.data.shards.index import read_index
from resnet_dist.data.shards.labels import LabelError, class_difference, class_ids, parse_label
from resnet_dist.data.shards.names import class_names, expand
from resnet_dist.data.shards.reader import BadSample, ShardReader
from resnet_dist.data.shards.verify import verify_index
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.driver.preflight import _check_classes_agree
from resnet_dist.errors import UserError
from tests.data.conftest import encoded, picture, write_members

CLASSES = ["cat", "dog", "snow leopard"]
IMAGE = encoded(picture(1))


def write_labelled(folder: Path, labels: list[bytes], extension: str = "cls") -> None:
    members = [
        m for n, label in enumerate(labels) for m in ((f"{n}.{extension}", label), (f"{n}.png", IMAGE))
    ]
    write_members(folder / "0.tar", members)


@pytest.mark.parametrize(
    ("content", "is_json", "label"),
    [
        (b"\xef\xbb\xbf2", False, 2),
        (b"2\r\n", False, 2),
        ("2\r\n".encode("utf-16"), False, 2),
        (b"dog\n", False, 1),
        (b"\xef\xbb\xbfdog\r\n", False, 1),
        (b"snow leopard", False, 2),
        (b'\xef\xbb\xbf{"label": 2}', True, 2),
        (b'{"label": "cat"}', True, 0),
        (b'{"cls": "dog\\r\\n", "width": 3}', True, 1),
    ],
)
def test_what_is_read(content: bytes, is_json: bool, label: int) -> None:
    assert parse_label(content, is_json=is_json, ids=class_ids(CLASSES)) == label


@pytest.mark.parametrize(
    ("content", "is_json", "there"),
    [
        (b"3.0", False, '"3.0"'),
        (b"1e3", False, '"1e3"'),
        (b"1_0", False, '"1_0"'),
        (b"3\0", False, r'"3\\u0000"'),
        (b"Cat", False, '"Cat"'),
        (b"\xff\xff", False, r"b'\\xff\\xff'"),
        (b" \n", False, "empty"),
        (b'{"label": 3.0}', True, "label is 3.0"),
        (b'{"label": "3"}', True, '"3"'),
        (b'{"label": [3]}', True, r"label is \[3\]"),
        (b'{"label": null}', True, "label is null"),
        (b'{"annotation": {"label": 3}}', True, r"it has annotation"),
        (b"3", True, "it holds 3"),
        (b"{", True, "cannot be read"),
        (b'{"label": ' + b"[" * 900 + b"]" * 900 + b"}", True, "label is "),
    ],
)
def test_what_is_refused_is_quoted(content: bytes, is_json: bool, there: str) -> None:
    with pytest.raises(LabelError, match=there) as caught:
        parse_label(content, is_json=is_json, ids=class_ids(CLASSES))
    assert len(str(caught.value)) < 200


def test_a_number_is_never_a_name_and_two_classes_of_one_name_have_none() -> None:
    assert class_ids(["1", "0", "cat", "crane", "crane"]) == {"cat": 2}
    with pytest.raises(LabelError, match="not the name of one class"):
        parse_label(b"crane", is_json=False, ids=class_ids(["cat", "crane", "crane"]))


@pytest.mark.parametrize(
    "names", [b"cat\ndog\nsnow leopard\n", b"\xef\xbb\xbfcat\r\ndog\r\nsnow leopard\r\n"]
)
@pytest.mark.parametrize("as_json", [False, True])
def test_words_are_the_same_classes_to_index_and_reader(
    tmp_path: Path, limits: CacheLimits, names: bytes, as_json: bool
) -> None:
    words = [CLASSES[n % 3] for n in range(12)]
    labels = [json.dumps({"label": word}).encode() if as_json else word.encode() for word in words]
    write_labelled(tmp_path, labels, "json" if as_json else "cls")
    (tmp_path / "names.txt").write_bytes(names)
    shards = expand([str(tmp_path / "0.tar")])
    with pytest.raises(
        UserError, match=r'is a word, not a number; --classes FILE names the classes \(it is "cat"'
    ):
        build_index(shards, tmp_path, limits)
    build_index(shards, tmp_path, limits, classes=class_names(str(tmp_path / "names.txt")))
    for _ in range(2):  # the names of the index stay when it is made anew
        index = read_index(tmp_path)
        assert index.classes == tuple(CLASSES)
        reader = ShardReader(index, limits)
        assert [reader.read(i).label for i in range(12)] == [n % 3 for n in range(12)]
        assert verify_index(str(tmp_path), limits) == []
        _, findings = build_index(shards, tmp_path, limits)
        assert findings.used == 12
    assert class_names(str(tmp_path / "index.json")) == class_names(str(tmp_path)) == CLASSES


def test_a_word_without_a_class_is_left_out_by_index_and_reader(tmp_path: Path, limits: CacheLimits) -> None:
    write_labelled(tmp_path, [b"cat", b"cow", b"1"])
    index, findings = build_index(expand([str(tmp_path)]), tmp_path, limits, classes=CLASSES)
    assert [finding.line() for finding in findings.left_out] == [
        '0.tar/1: .cls label is not the name of one class (it is "cow")'
    ]
    with pytest.raises(BadSample, match="cow"):
        ShardReader(index, limits).read(1)
    write_labelled(tmp_path / "b", [b"cat", b"2"])
    with pytest.raises(UserError, match="--classes: 2 names, but a label is 2"):
        build_index(expand([str(tmp_path / "b")]), tmp_path / "b", limits, classes=CLASSES[:2])


def test_labels_from_1_are_refused_unless_empty_classes_are_allowed(
    tmp_path: Path, limits: CacheLimits
) -> None:
    write_labelled(tmp_path, [b"1", b"2", b"3"])
    shards = expand([str(tmp_path)])
    with pytest.raises(UserError, match=r"no sample has the label 0, but one has 3; .*--allow-empty"):
        build_index(shards, tmp_path, limits, options=IndexOptions(allow_empty=False))
    index, _ = build_index(shards, tmp_path, limits, options=IndexOptions(allow_empty=True))
    assert len(index.classes) == 4
    assert len(build_index(shards, tmp_path, limits, classes=class_names("10"))[0].classes) == 10


def test_a_split_of_shards_that_have_none_is_refused(tmp_path: Path, limits: CacheLimits) -> None:
    write_labelled(tmp_path, [b"0", b"1"])
    build_index(expand([str(tmp_path)]), tmp_path, limits)
    for name in (tmp_path, tmp_path / "index.json"):
        with pytest.raises(UserError, match=r"--split val: .* has no splits, which timm's _info.json has"):
            expand([str(name)], "val")


@pytest.mark.parametrize("count", ["1000001", "99999999999", "9" * 5000])
def test_a_number_of_classes_that_no_set_has_is_refused(count: str) -> None:
    with pytest.raises(UserError, match=f"--classes {count[:40]}: an index has at most 1,000,000 classes"):
        class_names(count)


def test_a_list_that_differs_is_named_with_the_flag_that_mends_it(
    tmp_path: Path, limits: CacheLimits
) -> None:
    for split, count in (("train", 10), ("eval", 9)):
        write_labelled(tmp_path / split, [b"%d" % (n % count) for n in range(20)])
        build_index(expand([str(tmp_path / split)]), tmp_path / split, limits)
    train, evaluation = read_index(tmp_path / "train"), read_index(tmp_path / "eval")
    mend = f"`resnet-dist index {evaluation.location} --out {evaluation.location} --classes {train.location}`"
    with pytest.raises(UserError, match="10 and 9 classes; only one of them has '9'") as caught:
        _check_classes_agree(train, evaluation)
    assert mend in str(caught.value)
    build_index(
        expand([evaluation.location]), Path(evaluation.location), limits, classes=class_names(train.location)
    )
    _check_classes_agree(train, read_index(tmp_path / "eval"))


def test_differences_of_classes() -> None:
    assert class_difference(("a", "b"), ("a", "b")) is None
    assert (
        class_difference(("a", "b"), ("b", "a"))
        == "2 and 2 classes; label 0 is 'a' and 'b', label 1 is 'b' and 'a'"
    )
    many = tuple(map(str, range(1000)))
    text = class_difference(many, many[::-1])
    assert text is not None
    assert text.endswith("label 4 is '4' and '995', …")
    assert len(text) < 200
    assert class_difference(many, many[:990]) is not None
