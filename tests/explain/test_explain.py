"""A picture beside each image, which is never replaced; what cannot be done is one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_dist.system import files
from tests.checkpoints import CLASSES
from tests.data.images.pictures import jpeg, photo, saved
from tests.predict.conftest import Command

PHOTO = jpeg(photo(80, 60))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(PHOTO)
    (folder / "a.png").write_bytes(saved(photo(33, 44), "PNG"))
    return folder


def test_a_picture_beside_each_image(command: Command, model: str, photos: Path) -> None:
    before = {path: path.read_bytes() for path in photos.iterdir()}
    code, out, err = command("explain", model, "photos")
    assert (code, err) == (0, "")
    lines = [line.split(": ") for line in out.splitlines()]
    assert [line[0] for line in lines] == ["photos/a.jpg.explained.png", "photos/a.png.explained.png"]
    row = command("predict", model, "photos/a.jpg", "--csv")[1].splitlines()[1].split(",")
    assert lines[0][1] == f"{row[1]}, {float(row[2]):.1%}"
    assert {path: path.read_bytes() for path in before} == before
    with Image.open(photos / "a.jpg.explained.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), int)
    assert pixels.shape == (360, 950, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500  # an image, and colors on it
    # Again: pictures of pictures are nobody's wish.
    code, again, err = command("explain", model, "photos", "--top", "2", "--class", CLASSES[3])
    assert code == 0
    assert err == "passed over: 2 a picture of an earlier explanation: photos/a.jpg.explained.png, …\n"
    assert [line.split(": ")[1].split(",")[0] for line in again.splitlines()] == [CLASSES[3]] * 2
    assert len(list(photos.iterdir())) == 4


def test_a_single_image_from_anywhere(command: Command, model: str, photos: Path, tmp_path: Path) -> None:
    code, out, _ = command("explain", model, (photos / "a.jpg").as_uri(), "--out", "new.png")
    assert (code, out.partition(":")[0]) == (0, "new.png")
    assert (tmp_path / "new.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos/a.jpg", "--out", "photos/a.png"], "--out photos/a.png: exists already; give another name"),
        (["photos/a.jpg", "--out", "x.jpg"], "--out x.jpg: the picture is a PNG"),
        (["photos/a.jpg", "--out", "none/x.png"], "--out none/x.png: no such folder"),
        (["photos", "--out", "x.png"], "--out x.png: one picture for 2 images; leave it out"),
        (
            ["photos/a.jpg", "--class", "mouse"],
            "--class 'mouse': the model has no such class; it has cat, dog",
        ),
        (
            ["photos/a.jpg", "--class", "dogs"],
            "--class 'dogs': the model has no such class; did you mean dog?",
        ),
        (["memory://bucket/a.jpg"], "is no file on this machine; --out FILE names the picture"),
        (["none.jpg"], "none.jpg: no such file or folder"),
    ],
)
def test_a_mistake_is_one_sentence(
    command: Command, model: str, photos: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/a.jpg", PHOTO)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command("explain", model, *words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_image_that_is_none_is_left_out(command: Command, model: str, photos: Path) -> None:
    (photos / "b.jpg").write_bytes(b"hello\n")
    (photos / "c.jpg").write_bytes(PHOTO)
    words = ["photos/a.jpg", "photos/b.jpg", "photos/c.jpg"]
    code, out, err = command("explain", model, *words)
    assert [line.partition(".")[0] for line in out.splitlines()] == ["photos/a", "photos/c"]
    assert err.splitlines()[0].startswith("left out photos/b.jpg: a bad image")
    assert (code, err.splitlines()[-1]) == (3, "exit code 3: 1 left out; --allow-left-out accepts this")
    assert not (photos / "b.jpg.explained.png").exists()
    assert command("explain", model, *words, "--allow-left-out")[0] == 0


def test_a_place_that_cannot_be_written(
    command: Command, model: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("resnet_dist.explain.run.write_bytes_atomically", fails)
    code, _, err = command("explain", model, "photos/a.jpg")
    assert (code, err) == (1, "error: photos/a.jpg.explained.png: cannot be written: Permission denied\n")
    assert files.write_bytes_atomically is not fails
