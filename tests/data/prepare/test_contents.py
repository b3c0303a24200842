"""The bytes of an image decide what is written, and what is said of it where it cannot be read."""

from __future__ import annotations

import io
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from resnet_dist.config import Recipe
from resnet_dist.data.findings import REPORT_NAME, Findings
from resnet_dist.data.prepare.items import Item, Source
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import Prepared, prepare_splits
from resnet_dist.data.prepare.write import PrepareOptions
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.errors import UserError
from resnet_dist.train.checkpoint.load import load_model
from resnet_dist.train.loop import train
from resnet_dist.train.tracker import NullTracker
from resnet_dist.world import World
from tests.data.conftest import encoded, picture
from tests.data.prepare.trees import image, write, write_classes

NO_CACHE = CacheLimits(Path("/nowhere"), 1, 1.0)
GOOD = image()


def prepared(folder: Path, out: Path, **options: object) -> Prepared:
    source = open_source(str(folder), whole_split="train")
    return prepare_splits(source, out, PrepareOptions(shards=1, **options))["train"]  # type: ignore[arg-type]


def extensions(done: Prepared) -> list[str]:
    """Return the extensions of the images in the first shard, sorted."""
    with tarfile.open(done.index.shards[0].url) as tar:
        return sorted(name.partition(".")[2] for name in tar.getnames() if not name.endswith(".cls"))


def test_the_bytes_decide_the_extension(tmp_path: Path) -> None:
    files = {
        "gif.jpg": ("gif", "gif"),
        "png.JPG": ("png", "png"),
        "tiff.png": ("tiff", "tif"),
        "avif.jpeg": ("avif", "avif"),
        "ppm.bmp": ("ppm", "ppm"),
        "jpeg.webp": ("jpeg", "jpg"),
        "a.jfif": ("jpeg", "jpg"),  # webdataset decodes no .jfif
        "b.JPE": ("jpeg", "jpg"),
        "c.jpeg": ("jpeg", "jpeg"),
        "d.tiff": ("tiff", "tiff"),
        "noname": ("webp", "webp"),
    }
    for number, (name, (form, _)) in enumerate(files.items()):
        write(tmp_path / "in/a" / name, image(number, form, 8))
    done = prepared(tmp_path / "in", tmp_path / "out")
    assert extensions(done) == sorted(extension for _, extension in files.values())
    assert not done.findings.left_out
    with tarfile.open(done.index.shards[0].url) as tar:
        members = [tar.extractfile(name) for name in tar.getnames() if not name.endswith(".cls")]
        written = {member.read() for member in members if member is not None}
    assert written == {path.read_bytes() for path in (tmp_path / "in/a").iterdir()}


def test_what_a_file_is_instead_is_its_reason(tmp_path: Path) -> None:
    bad = {
        "page.jpg": (b"<!doctype html><title>404</title>", "an HTML page"),
        "pointer.png": (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a Git LFS pointer, not the image",
        ),
        "cut.png": (GOOD[:40], "an image that cannot be decoded"),
        "large.png": (image(0, "png", 50), "an image of more than --max-pixels"),
        "zeros.jpg": (bytes(100), "a file of zeros"),
    }
    for name, (content, _) in bad.items():
        write(tmp_path / "in/a" / name, content)
    write(tmp_path / "in/a/good.png", GOOD)
    done = prepared(tmp_path / "in", tmp_path / "out", max_pixels=2000)
    assert {f.name: f.kind for f in done.findings.left_out} == {
        f"a/{n}": kind for n, (_, kind) in bad.items()
    }
    assert done.findings.used == 1
    text = (tmp_path / "out/train" / REPORT_NAME).read_text()
    assert "BytesIO" not in text
    assert "--max-pixels allows them" in text


def test_large_jpegs_are_shrunk(tmp_path: Path) -> None:
    shades = np.linspace(0, 255, 400).astype(np.uint8)
    pixels = np.ascontiguousarray(np.broadcast_to(shades[None, :, None], (301, 400, 3)))
    write(tmp_path / "in/a/large.jpg", simplejpeg.encode_jpeg(pixels, 95))
    with pytest.raises(UserError, match="more than --max-pixels .*301 x 400 pixels are more than 40,000"):
        prepared(tmp_path / "in", tmp_path / "none", max_pixels=40_000)
    done = prepared(tmp_path / "in", tmp_path / "out", max_pixels=40_000, resize_short=60)
    data = ShardReader(done.index, NO_CACHE).read(0).image
    small = np.asarray(Image.open(io.BytesIO(data)))
    assert small.shape == (60, 80, 3)
    assert np.abs(small[30, :, 1].astype(int) - np.linspace(0, 255, 80)).max() < 8
    with pytest.raises(UserError, match="more than --max-pixels"):  # half of the scale would not do
        prepared(tmp_path / "in", tmp_path / "none", max_pixels=40_000, resize_short=200)
    assert prepared(tmp_path / "in", tmp_path / "kept", max_pixels=130_000).findings.used == 1


def test_max_pixels_is_recorded_where_it_is_not_the_default(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", a=3)
    prepared(tmp_path / "in", tmp_path / "out")
    assert "max_pixels" not in (tmp_path / "out/train/index.json").read_text()  # as in version 0.3.0
    with pytest.raises(UserError, match="prepared with max_pixels=80000000; give another folder"):
        prepared(tmp_path / "in", tmp_path / "out", max_pixels=100)
    prepared(tmp_path / "in", tmp_path / "other", max_pixels=100)
    with pytest.raises(UserError, match="prepared with max_pixels=100; give another folder"):
        prepared(tmp_path / "in", tmp_path / "other")


def test_a_class_none_of_whose_images_can_be_read(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", good=3)
    write(tmp_path / "in/bad/0.png", GOOD[:40])
    message = "no image of 1 of its classes can be read in split train: 'bad';.*--allow-empty"
    with pytest.raises(UserError, match=message):
        prepared(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out/train/index.json").exists()
    assert "bad/0.png" in (tmp_path / "out/train" / REPORT_NAME).read_text()
    done = prepared(tmp_path / "in", tmp_path / "out", allow_empty=True)  # resumes
    assert (done.index.classes, done.findings.used, done.findings.num_left_out) == (("bad", "good"), 3, 1)


def test_strict_refuses_before_anything_is_written(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", a=3)
    (tmp_path / "in/a/gone.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"1 would be left out: 1 a broken link \(a/gone.png\)"):
        prepared(tmp_path / "in", tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "in/a/gone.png").unlink()
    write(tmp_path / "in/a/bad.png", GOOD[:40])
    prepared(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match="was prepared without --strict; 1 would be left out"):
        prepared(tmp_path / "in", tmp_path / "out", strict=True)


def test_a_complete_split_still_says_what_it_left_out(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", a=3)
    write(tmp_path / "in/a/bad.png", GOOD[:40])
    write(tmp_path / "in/notes.txt")
    first = prepared(tmp_path / "in", tmp_path / "out").findings
    again = prepared(tmp_path / "in", tmp_path / "out").findings
    assert first == again
    (tmp_path / "out/train" / REPORT_NAME).unlink()
    assert prepared(tmp_path / "in", tmp_path / "out").findings.num_left_out == 1


def test_findings_are_named_by_the_folder_of_the_split(tmp_path: Path) -> None:
    for split, number in (("Train", 0), ("Test", 1)):
        write_classes(tmp_path / "in" / split, a=2)
        write(tmp_path / "in" / split / "a/bad.png", GOOD[:40])
        write(tmp_path / "in" / split / f"{number}.txt")
    write(tmp_path / "in/labels.csv")
    done = prepare_splits(open_source(str(tmp_path / "in")), tmp_path / "out")
    names = {
        split: [f.name for f in one.findings.left_out + one.findings.passed_over]
        for split, one in done.items()
    }
    assert names == {
        "train": ["Train/a/bad.png", "labels.csv", "Train/0.txt"],
        "eval": ["Test/a/bad.png", "Test/1.txt"],
    }


def test_a_source_of_other_classes_is_not_the_same(tmp_path: Path) -> None:
    items = [Item(0, "png", partial(bytes, GOOD), "x", len(GOOD))]
    prepare_splits(Source("x", ("a",), {"train": items}), tmp_path)
    with pytest.raises(UserError, match="prepared with 1 classes, but x has 2"):
        prepare_splits(Source("x", ("a", "b"), {"train": items}), tmp_path)


def test_the_same_input_gives_the_same_report(tmp_path: Path) -> None:
    write_classes(tmp_path / "in", a=30)
    for number in range(0, 30, 4):
        write(tmp_path / f"in/a/{number}.png", encoded(picture(number))[:50])
    reports = []
    for workers in (1, 2):
        source = open_source(str(tmp_path / "in"), whole_split="train")
        out = tmp_path / f"out{workers}"
        prepare_splits(source, out, PrepareOptions(shards=4), workers=workers)
        reports.append((out / "train" / REPORT_NAME).read_bytes())
    assert reports[0] == reports[1]
    assert Findings.read(out / "train" / REPORT_NAME).num_left_out == 8


def test_training_on_names_that_are_not_utf_8(digits_recipe: Recipe, tmp_path: Path) -> None:
    names = ["caf\udce9", "cafe\u0301", "\U0001f408", "two\nlines"]
    for number, name in enumerate(names):
        for n in range(10):
            write(tmp_path / "in" / name / f"ni\udcf1o{n}\n.png", image(10 * number + n, size=8))
    prepare_splits(open_source(str(tmp_path / "in")), tmp_path / "out")
    overrides = {
        "data.train": tmp_path / "out/train",
        "data.eval": tmp_path / "out/eval",
        "data.global_batch_size": 16,
        "data.micro_batch_size": 16,
        "data.lanes": 4,
        "train.length": "2 steps",
        "schedule.warmup": "0 steps",
    }
    recipe = digits_recipe.with_overrides([f"{key}={value}" for key, value in overrides.items()])
    outcome = train(recipe, tmp_path / "run", World.single(), NullTracker())
    assert (outcome.step, outcome.metrics["eval/samples"]) == (2, 8)
    assert load_model(tmp_path / "run", torch.device("cpu")).classes == (
        "cafe\u0301",
        "caf\\xe9",
        "two\nlines",
        "\U0001f408",
    )
