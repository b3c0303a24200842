"""Every file of a folder is an image of its class, or a finding with its name and reason."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from resnet_dist.data.findings import Findings
from resnet_dist.data.images.formats import IMAGE_EXTENSIONS
from resnet_dist.data.prepare import scan as scan_module
from resnet_dist.data.prepare.items import Item, Source
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare_splits
from resnet_dist.errors import UserError
from tests.data.conftest import encoded, picture
from tests.data.prepare.trees import image, write, write_classes


def scanned(folder: Path, **options: object) -> tuple[list[Item], Findings]:
    """Return the items of a folder of classes, and all findings."""
    source = open_source(str(folder), whole_split="train", **options)  # type: ignore[arg-type]
    return list(source.splits["train"]), findings_of(source)


def findings_of(source: Source) -> Findings:
    findings = Findings()
    findings.add(source.findings.values())
    return findings


def kinds(findings: Findings) -> dict[str, str]:
    return {finding.name: finding.kind for finding in findings.left_out + findings.passed_over}


def test_every_image_extension_in_any_case(tmp_path: Path) -> None:
    for number, extension in enumerate(IMAGE_EXTENSIONS):
        suffix = extension.upper() if number % 2 else extension.capitalize()
        write(tmp_path / "a" / f"{number:02}.{suffix}", b"not read yet")
    items, findings = scanned(tmp_path)
    assert [item.extension for item in items] == list(IMAGE_EXTENSIONS)
    assert kinds(findings) == {}


def test_no_image_is_opened_at_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path, a=3)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr("builtins.open", refuse)
    assert len(scanned(tmp_path)[0]) == 3


@pytest.mark.parametrize("name", ["photo", "photo.img", "photo.jpg_large", "photo.txt", "img.0001"])
def test_an_image_of_another_name_is_used(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a" / name, image(form="gif"))
    items, findings = scanned(tmp_path)
    assert [(item.name, item.extension) for item in items] == [(f"a/{name}", "gif")]
    assert kinds(findings) == {}


LEFT_OUT = {
    "empty.jpg": (b"", "an empty file"),
    "empty": (b"", "an empty file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the image"),
    "page.img": (b"<!DOCTYPE html><html>", "an HTML page"),
    "many.zip": (b"PK\3\4", "a zip file"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an XML or SVG file"),
    "scan.dcm": (bytes(8) + b"\1" * 200, "not an image that is known here"),
    "photo.nef": (b"II*\0", "a camera's raw file, .nef"),
    "photo.jpg.crdownload": (b"\xff\xd8\xff", "an unfinished download, .crdownload"),
}
PASSED_OVER = {
    "labels.csv": (b"a,b", "a .csv file"),
    "labels.XML": (b"<?xml", "a .xml file"),
    "empty.txt": (b"", "a .txt file"),
    "README": (b"These are cats.", "a text file"),
    "P1": (b"P1 shows a cat, P2 a dog.", "a text file"),
    "Thumbs.db": (b"\xd0\xcf", "a file of a tool"),
    "desktop.ini": (b"[x]", "a file of a tool"),
    ".DS_Store": (b"\0\0\0\1", "a hidden file"),
    "._0.png": (b"\0\5\26\7", "an AppleDouble file"),
    "0.png~": (image(), "a backup copy"),
    "0.png.bak": (image(), "a backup copy"),
}


def test_what_is_no_image_is_left_out_or_passed_over(tmp_path: Path) -> None:
    write_classes(tmp_path, a=1)
    for name, (content, _) in (LEFT_OUT | PASSED_OVER).items():
        write(tmp_path / "a" / name, content)
    items, findings = scanned(tmp_path)
    assert [item.name for item in items] == ["a/0.png"]
    for found, expected in ((findings.left_out, LEFT_OUT), (findings.passed_over, PASSED_OVER)):
        assert {f.name: f.kind for f in found} == {f"a/{name}": kind for name, (_, kind) in expected.items()}


def test_hidden_folders_and_those_of_tools_are_passed_over_at_every_level(tmp_path: Path) -> None:
    write_classes(tmp_path, a=2, b=2)
    for level in (tmp_path, tmp_path / "a", tmp_path / "a/deep"):
        for name in (".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX", "$RECYCLE.BIN"):
            write(level / name / "x/1.png", image())
            write(level / name / "2.png", image())
    (tmp_path / ".empty").mkdir()
    source = open_source(str(tmp_path), whole_split="train")
    assert source.classes == ("a", "b")
    assert len(source.splits["train"]) == 4
    findings = findings_of(source)
    assert (findings.num_left_out, findings.num_passed_over) == (0, 30)
    assert "a/deep/@eaDir/" in kinds(findings)


def test_links_are_followed(tmp_path: Path) -> None:
    write_classes(tmp_path / "store", x=3)
    write_classes(tmp_path / "in", a=2)
    (tmp_path / "in/a/more").symlink_to(tmp_path / "store/x")
    (tmp_path / "in/b").symlink_to(tmp_path / "store/x")
    (tmp_path / "in/a/one.png").symlink_to(tmp_path / "store/x/0.png")
    items, findings = scanned(tmp_path / "in")
    assert [item.name for item in items] == [
        "a/0.png",
        "a/1.png",
        *(f"a/more/{n}.png" for n in range(3)),
        "a/one.png",
        *(f"b/{n}.png" for n in range(3)),
    ]
    assert kinds(findings) == {}


def test_loops_of_links_end(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", a=1, b=1)
    (tmp_path / "in/a/self").symlink_to(tmp_path / "in/a")
    (tmp_path / "in/a/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/all").symlink_to(tmp_path / "in")
    (tmp_path / "in/b/itself.png").symlink_to(tmp_path / "in/b/itself.png")
    items, findings = scanned(tmp_path / "in")
    assert [item.name for item in items] == ["a/0.png", "b/0.png"]
    loop = "a link to a folder above it"
    assert kinds(findings) == {"a/self/": loop, "a/up/": loop, "all/": loop, "b/itself.png": "a broken link"}


def test_folders_that_all_link_to_one_another_end(tmp_path: Path) -> None:
    names = [f"f{number}" for number in range(8)]
    for name in names:
        write_classes(tmp_path / "store", **{name: 1})
        for other in names:
            (tmp_path / "store" / name / f"to_{other}").symlink_to(tmp_path / "store" / other)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").symlink_to(tmp_path / "store/f0")
    items, findings = scanned(tmp_path / "in")
    assert len(items) <= 8 * (scan_module.MAX_VISITS + 1)
    assert "a folder that links lead to more than 100 times" in kinds(findings).values()


def test_broken_links_are_left_out(tmp_path: Path) -> None:
    write_classes(tmp_path, a=2)
    (tmp_path / "a/3.png").symlink_to(tmp_path / "annex/3.png")
    (tmp_path / "b").symlink_to(tmp_path / "moved")  # a class
    (tmp_path / "a/notes.txt").symlink_to(tmp_path / "gone.txt")
    items, findings = scanned(tmp_path)
    assert len(items) == 2
    assert [(f.name, f.kind) for f in findings.left_out] == [
        ("b", "a broken link"),
        ("a/3.png", "a broken link"),
    ]
    assert f"to {tmp_path}/annex/3.png" in findings.left_out[1].detail
    assert kinds(findings)["a/notes.txt"] == "a broken link"


def test_a_folder_without_permission_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path, a=2)
    write_classes(tmp_path / "a", locked=2)
    original = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    items, findings = scanned(tmp_path)
    assert len(items) == 2
    assert [f.line() for f in findings.left_out] == ["a/locked/: a folder without permission to read it"]
    write_classes(tmp_path, locked=2)
    with pytest.raises(
        UserError, match=r"1 of 2 classes have no samples: 'locked' \(it has 1 × a folder without"
    ):
        scanned(tmp_path)
    assert len(scanned(tmp_path, allow_empty=True)[1].left_out) == 2


def test_what_may_not_be_opened_is_no_reason_to_hang(tmp_path: Path) -> None:
    write_classes(tmp_path, a=1)
    os.mkfifo(tmp_path / "a/pipe.png")
    os.mkfifo(tmp_path / "a/pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.open(tmp_path / "a", os.O_RDONLY)  # the name of a socket must be short
        sock.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
        items, findings = scanned(tmp_path)
    assert len(items) == 1
    assert [f.name for f in findings.left_out] == ["a/pipe.png"]
    assert [f.name for f in findings.passed_over] == ["a/pipe", "a/socket"]


def test_images_outside_of_the_classes_are_left_out(tmp_path: Path) -> None:
    write_classes(tmp_path, a=1)
    write(tmp_path / "cover.jpg", image())
    write(tmp_path / "cover", image())
    write(tmp_path / "data.zip", b"PK\3\4")
    write(tmp_path / "labels.csv", b"a,b")
    _, findings = scanned(tmp_path)
    assert {f.name for f in findings.left_out} == {"cover", "cover.jpg"}
    assert {f.name for f in findings.passed_over} == {"data.zip", "labels.csv"}


def test_the_output_folder_is_no_class(tmp_path: Path) -> None:
    write_classes(tmp_path, a=2)
    write(tmp_path / "out/train/0.tar", b"x")
    write_classes(tmp_path / "a/out", c=3)
    (tmp_path / "a/link").symlink_to(tmp_path / "out")
    items, findings = scanned(tmp_path, output=tmp_path / "a/../out")
    assert len(items) == 5
    assert kinds(findings) == {"out/": "the output folder", "a/link/": "the output folder"}


def test_folders_deeper_than_python_recurses(tmp_path: Path) -> None:
    folder, depth = write_classes(tmp_path, a=1) / "a", 1100
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(folder)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        Path("x.png").write_bytes(image())
        deepest = os.open(".", os.O_RDONLY)
        os.fchdir(here)
        items, _ = scanned(tmp_path)
        assert len(items) == 2
    finally:
        # Remove the folders here: shutil recurses, and would fail when pytest clears its folders some runs later.
        os.fchdir(deepest)
        Path("x.png").unlink()
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("d")
        os.fchdir(here)


def test_names_that_differ_in_case_alone_are_two_images(tmp_path: Path) -> None:
    write(tmp_path / "a/x.png", image(0))
    write(tmp_path / "a/X.PNG", image(1))
    write(tmp_path / "A/x.png", image(2))
    source = open_source(str(tmp_path), whole_split="train")
    assert source.classes == ("A", "a")
    assert [item.read() for item in source.splits["train"]] == [image(2), image(1), image(0)]


def test_classes_without_samples_are_refused_by_name(tmp_path: Path) -> None:
    write_classes(tmp_path, cat=2, dog=2, bird=0)
    write(tmp_path / "bird/notes.txt", b"todo")
    with pytest.raises(
        UserError, match=r"1 of 3 classes have no samples: 'bird' \(it has 1 × a .txt file\).*--allow-empty"
    ):
        open_source(str(tmp_path))
    source = open_source(str(tmp_path), allow_empty=True)
    assert source.classes == ("bird", "cat", "dog")
    assert {item.label for item in source.splits["train"]} == {1, 2}


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    for name in (b"caf\xe9", "cafe\u0301".encode(), "café".encode(), "\U0001f408".encode(), b"two\nlines"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        with open(os.path.join(folder, b"ni\xf1o.png"), "wb") as file:
            file.write(image())
    source = open_source(str(tmp_path), whole_split="train")
    assert source.classes == ("cafe\u0301", "café", "caf\\xe9", "two\nlines", "\U0001f408")
    assert all(item.read() == image() for item in source.splits["train"])
    (tmp_path / "caf\\xe9").mkdir()
    with pytest.raises(UserError, match="two folders of classes have the name 'caf.*xe9'"):
        open_source(str(tmp_path))


def test_a_complete_split_still_counts_what_its_source_has_lost_since(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / f"in/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(8, 8), "png"))

    def prepared() -> Findings:
        return prepare_splits(open_source(str(tmp_path / "in"), whole_split="train"), tmp_path / "out")[
            "train"
        ].findings

    assert prepared().left_out == []
    (tmp_path / "in/a/lost.png").symlink_to(tmp_path / "nowhere.png")
    for _ in range(2):
        assert [finding.kind for finding in prepared().left_out] == ["a broken link"]
    assert "a broken link" in (tmp_path / "out/train/left-out.txt").read_text()
