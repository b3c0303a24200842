"""prepare gives the same bytes on any number of processes, and leaves nothing half-written or lost silently."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from resnet_dist.data.prepare import split as split_module
from resnet_dist.data.prepare.sources import Item, Source, open_source
from resnet_dist.data.prepare.split import prepare
from resnet_dist.data.prepare.write import PrepareOptions
from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import read_index
from resnet_dist.data.shards.names import expand
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.errors import UserError
from tests.data.conftest import encoded, picture, write_tar
from tests.data.shards.test_reader import checksums

NO_CACHE = CacheLimits(Path("/nowhere"), 1, 1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder of 30 images in 3 classes and 4 formats."""
    for number in range(30):
        form, suffix = [("jpeg", ".JPG"), ("png", ".png"), ("webp", ".webp"), ("bmp", ".bmp")][number % 4]
        path = tmp_path / "in" / f"class {number % 3}" / f"photo {number}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number, 40 + number), form))
    (tmp_path / "in/class 0/notes.txt").write_text("no image")
    return tmp_path / "in"


def test_bytes_do_not_depend_on_the_number_of_processes(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder), whole_split="train")
    one = prepare(source, tmp_path / "one", PrepareOptions(shards=5), workers=1)
    two = prepare(source, tmp_path / "two", PrepareOptions(shards=5), workers=2)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "two")
    assert one["train"].counts == two["train"].counts == (6,) * 5
    files = {path.read_bytes() for path in folder.rglob("photo*")}
    reader = ShardReader(one["train"], NO_CACHE)
    assert {reader.read(i).image for i in range(30)} == files
    assert one["train"].classes == ("class 0", "class 1", "class 2")


def test_shrinking(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder), whole_split="train")
    index = prepare(source, tmp_path / "out", PrepareOptions(resize_short=50, quality=95, shards=1))["train"]
    reader = ShardReader(index, NO_CACHE)
    sizes, kept = [], 0
    for sample_id in range(30):
        data = reader.read(sample_id).image
        sizes.append(Image.open(io.BytesIO(data)).size)
        kept += any(data == path.read_bytes() for path in folder.rglob("photo*"))
    assert sorted(sizes) == sorted((min(50, 40 + n),) * 2 for n in range(30))
    assert kept == 11  # images of 40 to 50 pixels are not shrunk
    landscape = tmp_path / "wide/a/x.png"
    landscape.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((90, 201, 3), np.uint8)).save(landscape)
    wide = prepare(
        open_source(str(tmp_path / "wide"), whole_split="train"),
        tmp_path / "w",
        PrepareOptions(resize_short=45),
    )
    data = ShardReader(wide["train"], NO_CACHE).read(0).image
    assert Image.open(io.BytesIO(data)).size == (100, 45)


def test_about_so_many_bytes_in_a_shard(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder), whole_split="train")
    total = sum(item.num_bytes for item in source.splits["train"])
    index = prepare(source, tmp_path / "out", PrepareOptions(shard_bytes=total // 10))["train"]
    assert len(index.shards) == 10


def test_unreadable_images_are_left_out_and_listed(folder: Path, tmp_path: Path) -> None:
    (folder / "class 1/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    truncated = folder / "class 2/photo 8.JPG"
    truncated.write_bytes(truncated.read_bytes()[:-100])
    source = open_source(str(folder), whole_split="train")
    with pytest.raises(
        UserError, match=r"2 would be left out: 2 an image that cannot be decoded \(class 1/broken"
    ):
        prepare(source, tmp_path / "out", PrepareOptions(shards=3, strict=True), workers=2)
    assert not (tmp_path / "out").exists()  # nothing half-written stays
    index = prepare(source, tmp_path / "out", PrepareOptions(shards=3))["train"]
    assert index.num_samples == 29
    lines = [line.split("\t") for line in (tmp_path / "out/train/left-out.txt").read_text().splitlines()]
    assert [line[:3] for line in lines] == [
        ["left out", "class 1/broken.jpg", "an image that cannot be decoded"],
        ["left out", "class 2/photo 8.JPG", "an image that cannot be decoded"],
        ["passed over", "class 0/notes.txt", "a .txt file"],
    ]
    again = prepare(source, tmp_path / "again", PrepareOptions(shards=3), workers=2)["train"]
    assert again.digest() == index.digest()
    for path in folder.rglob("photo*"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 31 images of split train can be read.*a text file"):
        prepare(open_source(str(folder), whole_split="train"), tmp_path / "none")


def test_the_report_of_an_earlier_call_is_removed(folder: Path, tmp_path: Path) -> None:
    path = folder / "class 2/photo 8.JPG"
    content = path.read_bytes()
    broken = Item(0, "jpg", partial(bytes, 9), "broken", len(content))
    whole = Item(0, "jpg", partial(bytes, content), "broken", len(content))
    with pytest.raises(UserError, match="none of the 1 images .* is broken: a file of zeros"):
        prepare(Source("x", ("a",), {"train": [broken]}), tmp_path)
    assert (tmp_path / "train/left-out.txt").exists()
    assert prepare(Source("x", ("a",), {"train": [whole]}), tmp_path)["train"].num_samples == 1
    assert not (tmp_path / "train/left-out.txt").exists()


def test_a_changed_image_does_not_change_the_cut(tmp_path: Path) -> None:
    """The plan has no sizes of images that are generated when they are read, but it records the number of shards."""
    small, large = encoded(picture(0, 8)), encoded(picture(0, 120))

    def source(content: bytes, fail_at: int) -> Source:
        reads = itertools.count()

        def read() -> bytes:
            if next(reads) >= fail_at:
                raise KeyboardInterrupt
            return content

        return Source("made", ("a",), {"train": [Item(0, "png", read, str(n)) for n in range(60)]})

    options = PrepareOptions(shard_bytes=2 * len(small))
    with pytest.raises(KeyboardInterrupt):
        prepare(source(small, 90), tmp_path, options)  # 60 probes and half of the samples
    index = prepare(source(large, 10**9), tmp_path, options)["train"]
    assert len(index.shards) == 30 == len(list(tmp_path.rglob("*.tar")))
    assert index.num_samples == 60


def test_a_shard_of_another_cut_is_written_again(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder), whole_split="train")
    prepare(source, tmp_path / "whole", PrepareOptions(shards=3))
    prepare(source, tmp_path / "one", PrepareOptions(shards=1))
    out = tmp_path / "out/train"
    plan = split_module._plan(source.name, source.splits["train"], PrepareOptions(shards=3))
    out.mkdir(parents=True)
    # Version 0.3.0 wrote the plan without the number of shards.
    (out / ".plan.json").write_text(json.dumps(plan))
    for suffix in ("tar", "idx"):
        name = f"in-train-000000.{suffix}"
        shutil.copy(tmp_path / "one/train" / name, out / name)
    assert prepare(source, tmp_path / "out", PrepareOptions(shards=3))["train"].num_samples == 30
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


def end_this_process() -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_process_that_is_killed_is_explained(tmp_path: Path) -> None:
    items = [Item(0, "png", partial(bytes, encoded(picture(n))), str(n)) for n in range(20)]
    items[7] = replace(items[7], read=end_this_process)
    with pytest.raises(UserError, match="one of 2 processes was killed.*fewer --workers"):
        prepare(Source("x", ("a",), {"train": items}), tmp_path, PrepareOptions(shards=10), workers=2)
    assert not (tmp_path / "train/index.json").exists()


def test_ctrl_c_while_processes_start_is_left_to_the_parent(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for number in range(200):
        path = tmp_path / "in" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number)))
    words = ["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--shards", "40", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, str(program), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 100
    # Its two processes are started after the plan is written, and import torch first.
    while len(children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert (process.returncode, "Traceback" in errors) == (130, False), errors


WORKER = """
import sys
from resnet_dist.data.prepare.write import _import_webdataset_without_torch
_import_webdataset_without_torch()
assert "webdataset" in sys.modules and "torch" not in sys.modules
from resnet_dist.data.images.view import resize
assert "torch" in sys.modules
"""


def test_a_worker_imports_torch_only_to_shrink() -> None:
    subprocess.run([sys.executable, "-c", WORKER], check=True)


class Flaky:
    """An image that fails the first times it is read, as on a network file system."""

    def __init__(self, content: bytes, failures: int) -> None:
        self.content, self.failures = content, failures

    def __call__(self) -> bytes:
        self.failures -= 1
        if self.failures >= 0:
            raise OSError(5, "Input/output error")
        return self.content


@pytest.mark.parametrize(("failures", "samples"), [(1, 10), (2, 9), (10, 9)])
def test_an_image_that_can_be_read_later_is_not_lost(tmp_path: Path, failures: int, samples: int) -> None:
    items = [Item(0, "png", Flaky(encoded(picture(n)), failures * (n == 4)), str(n)) for n in range(10)]
    index = prepare(Source("flaky", ("a",), {"train": items}), tmp_path, PrepareOptions(shards=1))["train"]
    assert index.num_samples == samples
    report = tmp_path / "train/left-out.txt"
    assert (report.read_text() if report.exists() else "") == (
        "" if samples == 10 else "left out\t4\ta file that cannot be read\tInput/output error\t1\n"
    )


def test_a_full_disk_is_no_unreadable_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = webdataset.TarWriter.write, iter(range(100))

    def write(self: object, sample: object) -> object:
        if next(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(self, sample)

    source = open_source(str(folder), whole_split="train")
    monkeypatch.setattr(webdataset.TarWriter, "write", write)
    with pytest.raises(UserError, match=r"could not be written .*No space left"):
        prepare(source, tmp_path / "out", PrepareOptions(shards=2))
    assert not list((tmp_path / "out").rglob("*partial")) + list((tmp_path / "out").rglob("*.tar"))
    assert prepare(source, tmp_path / "out", PrepareOptions(shards=2))["train"].num_samples == 30


def test_folders_that_are_no_classes(folder: Path, tmp_path: Path) -> None:
    (folder / ".ipynb_checkpoints").mkdir()
    assert open_source(str(folder)).classes == ("class 0", "class 1", "class 2")
    (tmp_path / "half").mkdir()
    folder.rename(tmp_path / "half/train")
    with pytest.raises(
        UserError, match=r"has train/ with folders of classes, but not an evaluation folder \(eval, "
    ):
        open_source(str(tmp_path / "half"))
    assert len(open_source(str(tmp_path / "half/train")).classes) == 3


def test_a_folder_that_holds_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder), whole_split="train")
    prepare(source, tmp_path / "out", PrepareOptions(shards=2))
    before = checksums(tmp_path / "out")
    prepare(source, tmp_path / "out", PrepareOptions(shards=2))  # the same options are no error
    with pytest.raises(UserError, match=r"prepared with seed=0.*give another folder"):
        prepare(source, tmp_path / "out", PrepareOptions(shards=2, seed=1))
    with pytest.raises(UserError, match=r"prepared with resize_short=None, shards=2"):
        prepare(source, tmp_path / "out", PrepareOptions(shards=3, resize_short=20))
    assert checksums(tmp_path / "out") == before
    (tmp_path / "tars/train").mkdir(parents=True)
    (tmp_path / "tars/train/mine.tar").write_bytes(b"x")
    with pytest.raises(UserError, match="holds tars that `prepare` did not write"):
        prepare(source, tmp_path / "tars")
    assert [p.name for p in (tmp_path / "tars/train").iterdir()] == ["mine.tar"]


def test_indexing_what_was_prepared_keeps_what_it_was_prepared_with(
    folder: Path, tmp_path: Path, limits: CacheLimits
) -> None:
    source, out = open_source(str(folder), whole_split="train"), tmp_path / "out"
    prepare(source, out, PrepareOptions(shards=2))
    index, _ = build_index(expand([str(out / "train")]), out / "train", limits, classes=["a", "b", "c"])
    assert index.classes == ("a", "b", "c")
    assert prepare(source, out, PrepareOptions(shards=2))["train"] == index
    with pytest.raises(UserError, match="prepared with shards=2"):
        prepare(source, out, PrepareOptions(shards=1))
    first = sorted((out / "train").glob("*.tar"))[0]
    write_tar(first, range(3))  # another program replaces a shard
    build_index(expand([str(out / "train")]), out / "train", limits)
    with pytest.raises(UserError, match="was not written by `prepare`"):
        prepare(source, out, PrepareOptions(shards=2))


def test_splits(folder: Path, tmp_path: Path) -> None:
    held_out = open_source(str(folder))
    assert prepare(held_out, tmp_path / "a", splits=["eval"])["eval"].num_samples == 6
    assert not (tmp_path / "a/train").exists()
    with pytest.raises(UserError, match="--split eval: in has train"):
        prepare(open_source(str(folder), whole_split="train"), tmp_path / "b", splits=["eval"])


PROGRAM = """
import sys
from resnet_dist.cli import main
if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with 1,500 images in `in`, and their shards from an uninterrupted call in `whole`."""
    folder = tmp_path_factory.mktemp("many")
    for image in range(1500):
        path = folder / "in" / str(image % 2) / f"{image}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(image, 64)))
    prepare(open_source(str(folder / "in")), folder / "whole", PrepareOptions(shards=40))
    return folder


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGKILL])
def test_a_killed_preparation_is_resumed(many: Path, tmp_path: Path, number: signal.Signals) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    arguments = ["prepare", str(many / "in"), str(tmp_path / "out"), "--shards", "40", "--workers", "2"]
    command = [sys.executable, str(program), *arguments]
    first = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 100
    while len(list((tmp_path / "out").glob("train/*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(first.pid, number)  # to the parent and its workers, as a terminal does
    else:
        first.kill()
    _, errors = first.communicate(timeout=100)  # waits for the workers too, because they hold the pipes
    assert first.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in errors
    assert not (tmp_path / "out/train/index.json").exists()
    written = len(list((tmp_path / "out").glob("train/*.tar")))
    assert 3 <= written < 40
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    left = {name: value for name, value in checksums(tmp_path / "out").items() if "partial" not in name}
    assert left == checksums(many / "whole")
    assert read_index(tmp_path / "out/train").num_samples == 1200


class FakeSet:
    """A data set with the interface of torchvision's CIFAR10 and MNIST."""

    classes = ("ant", "bee")

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert download
        count = 12 if train else 4
        self.data = np.stack([picture(n + 100 * train) for n in range(count)])
        self.targets = [n % 2 for n in range(count)]


def test_torchvisions_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeSet)
    indexes = prepare(open_source("cifar10"), tmp_path)
    assert (indexes["train"].num_samples, indexes["eval"].num_samples) == (12, 4)
    assert indexes["train"].classes == ("ant", "bee")
    reader = ShardReader(indexes["eval"], NO_CACHE)
    pictures = {np.asarray(Image.open(io.BytesIO(reader.read(i).image))).tobytes() for i in range(4)}
    assert pictures == {picture(n).tobytes() for n in range(4)}

    def offline(root: str, train: bool, download: bool) -> None:
        raise RuntimeError("URLError: no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(UserError, match=r"'cifar10': torchvision could not download it .*no network"):
        open_source("cifar10")


def test_a_real_torchvision_class_has_what_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Read MNIST's tensors through torchvision's own parser of its files."""
    import torchvision.datasets

    raw = tmp_path / "home/.cache/resnet-dist/downloads/mnist/MNIST/raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 20), ("t10k", 5)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
        header = np.array([2051, count, 28, 28], ">i4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = np.arange(count, dtype=np.uint8) % 10
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            np.array([2049, count], ">i4").tobytes() + labels.tobytes()
        )
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert isinstance(torchvision.datasets.MNIST, type)
    source = open_source("mnist")
    assert [len(items) for items in source.splits.values()] == [20, 5]
    assert Image.open(io.BytesIO(source.splits["eval"][3].read())).size == (28, 28)
    assert len(source.classes) == 10


def test_what_decides_the_bytes_is_in_the_plan() -> None:
    fields = set(PrepareOptions.__dataclass_fields__) - {"strict", "allow_empty"}
    plan = split_module._plan("x", [], PrepareOptions(max_pixels=1, seekable=True))
    assert fields <= set(plan)
