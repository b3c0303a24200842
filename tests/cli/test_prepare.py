"""`prepare` as a person types it: the summary, --json, the exit codes, and what is refused before anything is read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resnet_dist.cli.main import run_command
from resnet_dist.data.prepare import output as output_module
from tests.data.prepare.trees import image, write, write_classes

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `resnet-dist prepare` in this process and in `tmp_path`; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["resnet-dist", "prepare", *words])
        code = run_command()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return command


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Make a folder of two classes, with files that are left out and passed over."""
    folder = write_classes(tmp_path / "in", cat=5, dog=5)
    write(folder / "cat/page.jpg", b"<!doctype html>")
    write(folder / "cat/empty.png")
    (folder / "dog/gone.png").symlink_to("annex/gone.png")
    write(folder / "dog/ni\udcf1o.png", b"no image")
    write(folder / "dog/@eaDir/0.png", image())
    write(folder / "labels.csv", b"0,cat")
    return folder


def test_the_summary_and_exit_code_3(prepare: Command, odd: Path) -> None:
    code, out, err = prepare("in", "out", "--split", "train", "--shards", "1")
    assert code == 3
    assert out.splitlines()[1:] == [
        "train: 10 samples of 2 classes in 1 shards, out/train/index.json",
        "  used         10",
        "  left out      1  an empty file: cat/empty.png",
        "  left out      1  a broken link: dog/gone.png",
        "  left out      1  an HTML page: cat/page.jpg",
        "  left out      1  a text file: dog/ni\\xf1o.png",
        "  passed over   1  a .csv file: labels.csv",
        "  passed over   1  a folder of a tool: dog/@eaDir/",
        "  listed in out/train/left-out.txt",
    ]
    assert err == "exit code 3: 4 left out; --allow-left-out accepts this, --strict refuses it\n"
    assert len((odd.parent / "out/train/left-out.txt").read_text().splitlines()) == 6
    # The same call, which writes nothing, says the same.
    code, again, _ = prepare("in", "out", "--split", "train", "--shards", "1")
    assert (code, again.splitlines()) == (3, out.splitlines()[1:])
    assert prepare("in", "out", "--split", "train", "--shards", "1", "--allow-left-out")[0] == 0


def test_json(prepare: Command, odd: Path) -> None:
    code, out, err = prepare("in", "out", "--json", "--allow-left-out")
    assert code == 0
    assert "train: " in err  # the progress
    value = json.loads(out)
    assert set(value) == {"train", "eval"}
    assert set(value["train"]) == {"used", "left_out", "passed_over", "classes", "shards", "index", "report"}
    assert sum(value[split]["used"] for split in value) == 10
    assert sum(count for split in value for count in value[split]["left_out"].values()) == 4
    assert sum(count for split in value for count in value[split]["passed_over"].values()) == 2
    assert value["train"]["classes"] == 2
    assert value["train"]["report"] == "out/train/left-out.txt"


def test_nothing_left_out_is_exit_code_0(prepare: Command, tmp_path: Path) -> None:
    write_classes(tmp_path / "in", cat=5, dog=5)
    write(tmp_path / "in/cat/README.md", b"Cats.")
    code, out, err = prepare("in", "out", "--shards", "1", "--strict")
    assert (code, err) == (0, "")
    assert "  passed over  1  a .md file: cat/README.md" in out


def test_strict_leaves_nothing_behind(prepare: Command, odd: Path) -> None:
    code, _, err = prepare("in", "out", "--strict")
    assert code == 2
    assert err.startswith(
        "error: 2 would be left out: 1 an empty file (cat/empty.png); 1 a broken link (dog/gone.png)"
    )
    (odd / "cat/empty.png").unlink()
    (odd / "dog/gone.png").unlink()
    code, _, err = prepare("in", "out", "--strict", "--split", "train")
    assert code == 2
    assert "1 an HTML page (cat/page.jpg)" in err
    assert not (odd.parent / "out").exists()


def test_classes_without_images(prepare: Command, tmp_path: Path) -> None:
    write_classes(tmp_path / "in", cat=5, dog=5, bird=0)
    code, _, err = prepare("in", "out")
    assert code == 2
    assert "1 of 3 classes have no samples: 'bird'" in err
    assert not (tmp_path / "out").exists()
    code, out, _ = prepare("in", "out", "--allow-empty", "--json")
    assert (code, json.loads(out)["train"]["classes"]) == (0, 3)


@pytest.mark.parametrize(
    "target",
    [
        "s3://bucket/x",
        "gs://b",
        "https://host/x",
        "s3:/bucket/x",
        "pipe:cat",
        "simplecache::s3://b/x",
        "hf://d/x",
    ],
)
def test_a_url_as_output_is_refused(prepare: Command, odd: Path, target: str) -> None:
    code, out, err = prepare("in", target)
    assert (code, out) == (2, "")
    assert "is a URL: this command writes to a folder on this machine" in err
    assert err.count("\n") == 1
    assert [path.name for path in odd.parent.iterdir()] == ["in"]


def test_a_password_in_a_url_is_not_shown(prepare: Command, odd: Path) -> None:
    for words in (("in", "s3://me:secret@bucket/x"), ("s3://me:secret@bucket/x", "out")):
        code, _, err = prepare(*words)
        assert code == 2
        assert "secret" not in err


def test_file_urls(prepare: Command, tmp_path: Path) -> None:
    write_classes(tmp_path / "in", cat=5)
    assert prepare("in", f"file://{tmp_path}/with%20space", "--shards", "1")[0] == 0
    assert (tmp_path / "with space/train/index.json").exists()
    code, _, err = prepare("in", "file://out")
    assert code == 2
    assert "must have three slashes" in err


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_read(
    prepare: Command, odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    def read(*arguments: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr("resnet_dist.data.prepare.sources.open_source", read)
    with monkeypatch.context() as patch:
        patch.setattr(output_module.tempfile, "TemporaryFile", refuse)
        code, _, err = prepare("in", "out")
    assert (code, err) == (
        2,
        "error: out/train: cannot be written (Read-only file system); give another output folder\n",
    )
    write(odd.parent / "file")
    (odd.parent / "link").symlink_to("nowhere")
    refused = (
        ("file/x", "file is a file"),
        ("link", "link is a broken link"),
        ("x" * 300, "cannot be written (File name too long)"),
    )
    for target, message in refused:
        code, _, err = prepare("in", target)
        assert code == 2
        assert message in err


def test_an_output_folder_in_the_source(prepare: Command, tmp_path: Path) -> None:
    write_classes(tmp_path / "in", cat=5, dog=5)
    for _ in range(2):  # the second time, there is such a folder
        assert prepare("in", "in/out", "--shards", "1")[0] == 0
    assert json.loads((tmp_path / "in/out/train/index.json").read_text())["classes"] == ["cat", "dog"]
    for target, message in (
        ("in/cat", "holds 0.png, which `prepare` did not write and would pass over"),
        ("in", "would put shards into the source itself"),
    ):
        code, _, err = prepare("in", target)
        assert code == 2
        assert message in err
    (tmp_path / "train").symlink_to(tmp_path / "in")
    assert prepare("train", ".")[0] == 2


def test_a_file_as_source(prepare: Command, tmp_path: Path) -> None:
    write(tmp_path / "in.zip", b"PK\3\4")
    code, _, err = prepare("in.zip", "out")
    assert code == 2
    assert "is a file; unpack it" in err
    code, _, err = prepare("x" * 300, "out")
    assert code == 2
    assert "neither a known data set" in err


def test_seekable_needs_a_program_and_names_what_it_left_unchanged(
    prepare: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path / "in", cat=5)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    code, _, err = prepare("in", "out", "--split", "train", "--seekable")
    assert code == 2
    assert "--seekable needs libjpeg-turbo's program jpegtran" in err
    assert not (tmp_path / "out").exists()
    write(tmp_path / "bin/jpegtran", b"#!/bin/sh\nexit 1\n").chmod(0o755)
    code, out, _ = prepare("in", "out", "--split", "train", "--seekable", "--shards", "1")
    assert code == 0
    assert "unchanged    5  not a JPEG: cat/0.png, …" in out
    code, out, _ = prepare("out", "again", "--split", "train", "--seekable", "--json")
    assert code == 0
    assert json.loads(out)["train"]["unchanged"] == {"not a JPEG": 5}
