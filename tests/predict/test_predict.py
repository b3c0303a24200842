"""One row for each image, wherever it lies; what is no image is named, and seen in the exit code."""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from resnet_dist.data.shards.index import read_index
from resnet_dist.predict import classify
from resnet_dist.predict.classify import MAX_BATCH
from resnet_dist.predict.row_file import RowFile
from resnet_dist.train.checkpoint.load import load_model
from resnet_dist.train.evaluate import evaluate, evaluation_loader
from resnet_dist.world import World
from tests.checkpoints import random_checkpoint
from tests.data.images.pictures import jpeg, photo, saved
from tests.data.servers import file_server
from tests.predict.conftest import Command

PHOTO, PNG = jpeg(photo(80, 60)), saved(photo(33, 44), "PNG")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of three images at several depths, and of a text beside them."""
    folder = tmp_path / "photos"
    (folder / "inner/train").mkdir(parents=True)
    (folder / "inner/eval").mkdir()
    for name, content in (
        ("b.jpg", PHOTO),
        ("a b.png", PNG),
        ("inner/train/c.jpg", PHOTO),
        ("notes.txt", b"hello\n"),
    ):
        (folder / name).write_bytes(content)
    return folder


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def rows_of(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


def test_rows_in_the_order_of_the_paths(command: Command, model: str, photos: Path) -> None:
    code, out, err = command("predict", model, "photos/b.jpg", "photos", "photos/*.png", "--json")
    assert code == 0, err
    rows = rows_of(out)
    names = ["photos/b.jpg", "photos/a b.png", "photos/b.jpg", "photos/inner/train/c.jpg", "photos/a b.png"]
    assert [row["input"] for row in rows] == names
    assert rows[0] == rows[2]
    assert [rows[3][key] for key in ("classes", "probabilities")] == [
        rows[0][key] for key in ("classes", "probabilities")
    ]
    assert len(rows[0]["classes"]) == 3  # type: ignore[arg-type]
    assert err == "passed over: 1 a .txt file: notes.txt\n"


def test_a_pattern_at_any_depth_names_each_file_once(command: Command, model: str, photos: Path) -> None:
    (photos / "broken.jpg").symlink_to("nothing")
    code, out, err = command("predict", model, "photos/**", "--json")
    names = [str(row["input"]) for row in rows_of(out)]
    assert sorted(names) == sorted({*names})
    assert len(names) == 5
    assert code == 3
    assert "bad image photos/broken.jpg: cannot be read: No such file or directory\n" in err
    assert "bad image photos/notes.txt: not a readable image: a text file\n" in err


def test_csv_and_the_table_hold_the_same(command: Command, model: str, photos: Path) -> None:
    _, out, _ = command("predict", model, "photos/b.jpg", "photos/a b.png", "--json", "--top", 6)
    first, second = rows_of(out)
    code, out, _ = command("predict", model, "photos/b.jpg", "photos/a b.png", "--csv", "--top", 99)
    heading, *lines = csv.reader(io.StringIO(out))
    assert (code, heading[:3], heading[-1], len(heading)) == (
        0,
        ["input", "class_1", "probability_1"],
        "problem",
        14,
    )
    assert [lines[0][0], *lines[0][1:13:2]] == ["photos/b.jpg", *first["classes"]]  # type: ignore[misc]
    assert [float(value) for value in lines[1][2:13:2]] == second["probabilities"]
    code, out, _ = command("predict", model, "photos/b.jpg", "photos/a b.png", "--top", 1)
    table = out.splitlines()
    assert [line[: len("photos/a b.png")].rstrip() for line in table] == ["photos/b.jpg", "photos/a b.png"]
    assert table[0].endswith(f"{first['probabilities'][0]:.2%}")  # type: ignore[index]


def test_an_image_that_is_none_has_a_row_and_a_code(command: Command, model: str, tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(PHOTO)
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    large = bytearray(jpeg(photo(16, 16), progressive=True))
    at = large.index(b"\xff\xc2")
    large[at + 5 : at + 9] = (10_000).to_bytes(2) * 2
    (tmp_path / "large.jpg").write_bytes(large)
    code, out, err = command("predict", model, "page.jpg", "good.jpg", "large.jpg", "--json")
    rows = rows_of(out)
    assert (code, [row["problem"] is None for row in rows]) == (3, [False, True, False])
    assert rows[0]["classes"] == []
    assert "bad image page.jpg: not a readable image: an HTML page\n" in err
    assert "bad image large.jpg: not a readable image: 10000 x 10000 pixels are more than" in err
    assert "exit code 3: 2 left out" in err
    code, out, _ = command("predict", model, "page.jpg", "good.jpg", "--allow-left-out")
    assert code == 0
    assert len(out.splitlines()) == 1


def test_shards_with_and_without_an_index(command: Command, model: str, tmp_path: Path) -> None:
    members = {"x/1.jpg": PHOTO, "x/1.cls": b"0", "x/2.png": PNG, "x/3.cls": b"1", "x/4.jpg": b"no image"}
    tar_of(tmp_path / "set.tar", members)
    code, out, err = command("predict", model, "set.tar", "--json")
    assert code == 3
    assert [row["input"] for row in rows_of(out)] == ["set.tar/x/1", "set.tar/x/2", "set.tar/x/4"]
    assert "passed over: 1 a sample without an image: set.tar/x/3\n" in err
    (tmp_path / "cut.tar").write_bytes((tmp_path / "set.tar").read_bytes()[:3000])
    code, out, err = command("predict", model, "cut.tar", "set.tar", "--json")
    assert (code, len(rows_of(out))) == (3, 4)
    assert "left out cut.tar: a shard that cannot be read (" in err
    code, out, err = command("predict", model, "set.tar", "missing.tar", "--json")
    assert (code, out, err) == (2, "", "error: missing.tar: no such file or folder\n")


def test_every_sample_of_an_index_once_as_evaluate_counts_it(
    command: Command, digits_data: Path, tmp_path: Path
) -> None:
    """More images than a batch has, and the held-out set's accuracy from the rows."""
    folder, _ = random_checkpoint(tmp_path, "model.name=resnet8", classes=tuple("0123456789"))
    code, out, err = command("predict", folder, digits_data / "eval", "--json", "--top", 1)
    assert code == 0, err
    rows, index = rows_of(out), read_index(digits_data / "eval")
    assert len(rows) == index.num_samples > MAX_BATCH
    assert len({str(row["input"]) for row in rows}) == len(rows)
    trained, world = load_model(folder, torch.device("cpu")), World.single()
    with evaluation_loader(index, trained.recipe.data, world) as loader:
        metrics = evaluate(trained.model, loader, world)
        labels = [loader._reader.read(number).label for number in range(index.num_samples)]
    hits = sum(row["classes"] == [str(label)] for row, label in zip(rows, labels, strict=True))
    assert hits / len(rows) == pytest.approx(metrics["eval/top1"])


def test_urls_and_stdin(command: Command, model: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected, _ = command("predict", model, "photos/b.jpg", "--json")
    with file_server(photos) as server:
        code, out, err = command("predict", model, f"{server.url}/b.jpg", f"{server.url}/none.jpg", "--json")
    assert code == 3
    good, bad = rows_of(out)
    # The last bits depend on how many images share a forward pass.
    assert good["probabilities"] == pytest.approx(rows_of(expected)[0]["probabilities"], rel=1e-5)
    assert "none.jpg" in str(bad["input"])
    for content, name in (
        (PHOTO, "stdin"),
        (b"photos/b.jpg\n", "photos/b.jpg"),
        (b"photos/b.jpg\0", "photos/b.jpg"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        code, out, err = command("predict", model, "-", "--json")
        assert (code, [row["input"] for row in rows_of(out)]) == (0, [name]), err


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["empty"], "empty: no images in this folder"),
        (["none.jpg"], "none.jpg: no such file or folder"),
        (["*.webp"], "*.webp: matches no file"),
        (["texts"], "texts: no images in this folder (1 a .txt file)"),
        (["x.jpg", "--json", "--csv"], "--json, --csv and --to exclude each other; use one of them"),
        (["x.jpg", "--to", "rows.txt"], "--to rows.txt: its name must end with .jsonl or .csv"),
        (["none.jpg", "--to", "rows.csv"], "none.jpg: no such file or folder"),
    ],
)
def test_a_mistake_in_a_path_is_one_sentence(
    command: Command, model: str, tmp_path: Path, paths: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("hello")
    code, out, err = command("predict", model, *paths)
    assert (code, out, err) == (2, "", f"error: {message}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "texts"}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_file_of_rows_is_continued_after_a_kill(
    command: Command, model: str, photos: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classify, "MAX_BATCH", 1)
    (photos / "bad.jpg").write_bytes(b"<html>")
    code, out, err = command("predict", model, "photos", "--to", name)
    assert (code, out) == (3, f"{name}: 4 rows\n"), err
    whole = (tmp_path / name).read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"photos", name}
    code, _, err = command("predict", model, "photos", "--to", name)
    assert (code, err) == (
        2,
        f"error: --to {name}: exists already and is whole; give another name, or remove it\n",
    )
    (tmp_path / name).unlink()
    written: list[str] = []

    def killed(self: RowFile, text: str) -> None:
        if len(written) == 2:  # in the middle of a row
            with (tmp_path / f"{name}.partial").open("a") as file:
                file.write(text[:7])
            raise KeyboardInterrupt
        written.append(text)
        write(self, text)

    write = RowFile.write
    with monkeypatch.context() as patched:
        patched.setattr(RowFile, "write", killed)
        code, out, err = command("predict", model, "photos", "--to", name)
    assert (code, out) == (130, "")
    assert err.endswith("interrupted; the same command resumes with what is not done yet\n")
    assert not (tmp_path / name).exists()
    code, _, err = command("predict", model, "photos", "--to", name, "--top", 2)
    assert (code, "was begun with another model or --top; remove it" in err) == (2, True)
    code, _, err = command("predict", model, "photos/b.jpg", "--to", name)
    assert (code, "row 1 of" in err, "give the same paths, or remove it" in err) == (2, True, True)
    code, out, err = command("predict", model, "photos", "--to", name)
    assert (code, out) == (3, f"{name}: 4 rows\n"), err
    names = [line.split(",")[0].split('", ')[0] for line in (tmp_path / name).read_text().splitlines()]
    assert names == [line.split(",")[0].split('", ')[0] for line in whole.splitlines()]
    assert {path.name for path in tmp_path.iterdir()} == {"photos", name}
