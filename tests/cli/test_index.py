"""`resnet-dist index`: one summary, its exit codes, its JSON, and the options that shape an index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.exceptions import Exit

from resnet_dist import cli
from resnet_dist.errors import UserError
from tests.data.conftest import encoded, picture, write_members

PHOTO, MASK = encoded(picture(1), "jpeg"), encoded(picture(2), "png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a folder with one of everything."""
    members: list[tuple[str, bytes]] = []
    for n in range(8):
        members += [(f"set/._{n}.jpg", b"\0\5\x16\7"), (f"set/{n}.png", MASK), (f"set/{n}.jpg", PHOTO)]
        members += [(f"set/{n}.cls", b"%d" % (n % 2))]
    members += [("set/8.jpg", PHOTO), ("set/8.npy", b"x"), ("set/9.txt", b"x"), ("set/10.gif", b"GIF89a")]
    members += [("set/10.cls", b"1.0"), ("set/11.jpg", PHOTO), ("README.md", b"x"), ("set/11.cls", b"0")]
    write_members(tmp_path / "in/0.tar", members)
    (tmp_path / "in/._0.tar").write_bytes(b"\0\5\x16\7")
    return tmp_path / "in"


def run(*words: str) -> int:
    """Run a command in this process. Returns its exit code."""
    try:
        return int(cli.app(list(words), standalone_mode=False) or 0)
    except Exit as end:
        return end.exit_code


def test_a_summary_and_exit_code_3(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("index", str(folder)) == 3
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == [
        f"14 samples of 2 classes in 1 shards, {folder}/index.json",
        "  used         8",
        "  left out     2  has no image: 0.tar/set/9, …",
        "  left out     1  .cls label is not a whole number: 0.tar/set/10",
        "  left out     1  has no label (.cls or .json; --label-ext reads others): 0.tar/set/8",
        "  left out     1  its label lies elsewhere in the tar: members of a sample must lie together (tar "
        "--sort=name): 0.tar/set/11",
        "  passed over  9  metadata of macOS: ._0.tar, …",
        "  passed over  8  several images in a sample: .jpg is read, not .png: 0.tar/set/0, …",
        "  passed over  1  members that lie apart from their image: 0.tar/set/11",
        f"  listed in {folder}/left-out.txt",
    ]
    assert err == "exit code 3: 5 left out; --allow-left-out accepts this, --strict refuses it\n"
    assert len((folder / "left-out.txt").read_text().splitlines()) == 5 + 9 + 1 + 1


def test_what_was_left_out_can_be_allowed_or_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=r"5 would be left out: 2 has no image \(0.tar/set/9"):
        run("index", str(folder), "--strict")
    assert sorted(folder.iterdir()) == before
    capsys.readouterr()
    assert run("index", str(folder), "--allow-left-out", "--json") == 0
    out, _ = capsys.readouterr()
    value = json.loads(out)
    assert (value["used"], value["classes"], value["shards"]) == (8, 2, 1)
    assert sum(value["left_out"].values()) == 5
    assert sum(value["passed_over"].values()) == 18
    assert (value["index"], value["report"]) == (f"{folder}/index.json", f"{folder}/left-out.txt")


def test_problems_of_a_verification_are_one_line_for_each_kind(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("index", str(folder), "--allow-left-out")
    capsys.readouterr()
    assert run("index", str(folder), "--verify") == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1] == "6 problems"
    assert len(err) == 4
    assert run("index", str(folder), "--verify", "--json") == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 6


def test_options_that_shape_an_index_make_a_new_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("index", str(folder))
    capsys.readouterr()
    assert run("index", str(folder), "--verify", "--image-ext", "png", "--json") == 1
    value = json.loads(capsys.readouterr().out)
    assert value["passed_over"]["several images in a sample: .png is read, not .jpg"] == 8
    assert value["problems"]
    assert run("index", str(folder), "--out", str(folder.parent / "two.json")) == 3
    assert (folder.parent / "two.left-out.txt").exists()


@pytest.mark.parametrize("place", ["s3://bucket/i.json", "https://host/i.json", "s3:/bucket/i", "pipe:cat"])
def test_a_url_as_output_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--out .* is a URL"):
        run("index", str(folder), "--out", place)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_file_url_as_output_is_a_path(folder: Path, tmp_path: Path) -> None:
    assert run("index", str(folder), "--out", f"file://{tmp_path}/o%20o/i.json") == 3
    assert (tmp_path / "o o/i.json").exists()
