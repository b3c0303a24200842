"""`prepare --seekable`: what is written anew is the same image; what would not be keeps its bytes, and is counted."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from resnet_dist.data.findings import REPORT_NAME
from resnet_dist.data.images.decode import open_image
from resnet_dist.data.images.jpeg.header import parse_header
from resnet_dist.data.images.jpeg.seekable import TABLE_NAME
from resnet_dist.data.images.opened import Box
from resnet_dist.data.prepare import seekable
from resnet_dist.data.prepare.output import PLAN_NAME
from resnet_dist.data.prepare.seekable import NOT_JPEG, REFUSED, SMALL, make_seekable, reason_unchanged
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import COUNT_KEY, Prepared, prepare_splits
from resnet_dist.data.prepare.write import PrepareOptions
from resnet_dist.data.shards.index import INDEX_NAME, PREPARED_KEY
from resnet_dist.errors import UserError
from tests.data.images.pictures import jpeg, photo, saved
from tests.data.prepare.trees import write

needs_jpegtran = pytest.mark.skipif(
    shutil.which(seekable.PROGRAM) is None, reason="jpegtran is not installed (libjpeg-turbo-progs)"
)
EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010F] = 6, "a camera"
METADATA = {"exif": EXIF.tobytes(), "icc_profile": b"profile" * 300, "comment": b"a comment"}
PHOTO = photo(200, 280)

Transform = Callable[[bytes, int], bytes | None]


def marked(data: bytes, interval: int, **changes: object) -> bytes:
    """Stand in for jpegtran: Pillow gives an image of the same pixels and settings the same coefficients."""
    kept = {"subsampling": "4:2:0", **METADATA, **changes}
    return jpeg(PHOTO, restart_marker_blocks=interval, optimize=True, **kept)


def original() -> bytes:
    return jpeg(PHOTO, subsampling="4:2:0", **METADATA)


def prepared(tmp_path: Path, **options: object) -> Prepared:
    source = open_source(str(tmp_path / "in"), whole_split="train")
    return prepare_splits(
        source,
        tmp_path / "out",
        PrepareOptions(shards=1, seekable=True, **options),  # type: ignore[arg-type]
    )["train"]


def images(done: Prepared) -> list[bytes]:
    with tarfile.open(done.index.shards[0].url) as tar:
        members = [tar.extractfile(name) for name in tar.getnames() if not name.endswith(".cls")]
        return [member.read() for member in members if member is not None]


def with_transform(monkeypatch: pytest.MonkeyPatch, transform: Transform) -> None:
    monkeypatch.setattr(seekable, "check_program", lambda: None)
    monkeypatch.setattr(seekable, "_transform", transform)
    monkeypatch.setattr("resnet_dist.data.prepare.split.check_program", lambda: None)


def test_a_jpeg_is_written_anew_with_its_pixels_and_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_transform(monkeypatch, marked)
    data = original()
    write(tmp_path / "in/a/photo.jpg", data)
    done = prepared(tmp_path)
    (found,) = images(done)
    header, _ = parse_header(found)
    assert found != data
    assert header is not None
    assert header.table_at
    assert np.array_equal(simplejpeg.decode_jpeg(found), simplejpeg.decode_jpeg(data))
    box = Box(20, 30, 100, 90)
    old, new = (open_image(image, 3).pixels(box, 224).copy() for image in (data, found))
    assert np.array_equal(old, new)
    with Image.open(io.BytesIO(found)) as image:
        assert image.getexif() == EXIF
        assert image.info["icc_profile"] == METADATA["icc_profile"]
        assert image.info["comment"] == METADATA["comment"]
    assert (done.findings.unchanged, done.findings.used) == ([], 1)


@pytest.mark.parametrize(
    ("what", "transform"),
    [
        ("nothing", lambda data, interval: None),
        ("garbage", lambda data, interval: b"\xff\xd8garbage\xff\xd9"),
        ("the same bytes", lambda data, interval: data),
        ("other pixels", lambda data, interval: marked(data, interval, quality=50)),
        ("rows of unequal intervals", lambda data, interval: marked(data, 5)),
        ("no color profile", lambda data, interval: marked(data, interval, icc_profile=None)),
        ("no comment", lambda data, interval: marked(data, interval, comment=b"")),
        ("another orientation", lambda data, interval: marked(data, interval, exif=b"")),
        ("a progressive one", lambda data, interval: marked(data, interval, progressive=True)),
    ],
)
def test_where_the_copy_is_not_the_image_its_bytes_are_kept(
    what: str, transform: Transform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_transform(monkeypatch, transform)
    data = original()
    write(tmp_path / "in/a/photo.jpg", data)
    done = prepared(tmp_path)
    assert images(done) == [data]
    assert [(f.name, f.kind) for f in done.findings.unchanged] == [("a/photo.jpg", REFUSED)]
    assert (done.findings.used, done.findings.num_left_out) == (1, 0)


def stale() -> bytes:
    """Return an image whose table another program has copied, and whose codes it has written anew."""
    seekable_one = make_seekable(original())
    assert seekable_one is not None
    start, end = seekable_one.index(TABLE_NAME) - 4, seekable_one.index(b"\xff\xdb")
    data = original()
    at = data.index(b"\xff\xdb")
    return data[:at] + seekable_one[start:end] + data[at:]


def test_a_table_that_does_not_fit_its_file_does_not_make_it_seekable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_transform(monkeypatch, marked)
    data = stale()
    assert reason_unchanged(data) == REFUSED
    table = data[data.index(TABLE_NAME) - 4 : data.index(b"\xff\xdb")]

    def copying(data: bytes, interval: int) -> bytes:
        copy = marked(data, interval)
        at = copy.index(b"\xff\xdb")
        return copy[:at] + table + copy[at:]

    with_transform(monkeypatch, copying)
    found = make_seekable(data)
    assert found is not None
    assert reason_unchanged(found) is None
    with_transform(monkeypatch, lambda data, interval: None)
    write(tmp_path / "in/a/photo.jpg", data)
    assert [f.kind for f in prepared(tmp_path).findings.unchanged] == [REFUSED]


def test_what_is_unchanged_is_counted_by_its_reason_also_when_the_set_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_transform(monkeypatch, marked)
    files = {
        "a.jpg": original(),
        "b.png": saved(photo(160, 160), "png"),
        "c.jpg": jpeg(photo(100, 100)),
        "d.jpg": jpeg(photo(160, 160).convert("CMYK")),
        "e.jpg": original() + b"behind the end",
    }
    for name, data in files.items():
        write(tmp_path / "in/a" / name, data)
    expected = {"a/b.png": NOT_JPEG, "a/c.jpg": SMALL, "a/d.jpg": REFUSED, "a/e.jpg": REFUSED}
    done = prepared(tmp_path)
    assert {f.name: f.kind for f in done.findings.unchanged} == expected
    assert {*images(done)} >= {files[name.removeprefix("a/")] for name in expected}
    assert ("unchanged", REFUSED, 2, "a/d.jpg") in done.findings.rows()
    assert done.findings.as_json()["unchanged"] == {NOT_JPEG: 1, SMALL: 1, REFUSED: 2}
    assert prepared(tmp_path).findings == done.findings


def test_a_shard_of_an_interrupted_call_is_counted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_transform(monkeypatch, marked)
    write(tmp_path / "in/a/photo.jpg", original())
    write(tmp_path / "in/a/other.png", saved(photo(160, 160), "png"))
    first = prepared(tmp_path).findings
    folder = tmp_path / "out/train"
    shards = {path: path.read_bytes() for path in folder.glob("*.tar")}
    plan = json.loads((folder / INDEX_NAME).read_text())[PREPARED_KEY]
    # As an interruption leaves it: the shard is there, the index and the report are not.
    (folder / PLAN_NAME).write_text(json.dumps({**plan, COUNT_KEY: 1}))
    (folder / INDEX_NAME).unlink()
    (folder / REPORT_NAME).unlink()
    with_transform(monkeypatch, lambda data, interval: pytest.fail("the shard was written again"))
    assert prepared(tmp_path).findings == first
    assert {path: path.read_bytes() for path in shards} == shards


def test_a_missing_program_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    write(tmp_path / "in/a/photo.jpg", original())
    with pytest.raises(UserError, match="--seekable needs .* jpegtran, .* install libjpeg-turbo-progs"):
        prepared(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_complete_set_needs_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in/a/photo.jpg", original())
    with monkeypatch.context() as patch:
        with_transform(patch, marked)
        first = prepared(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    again = prepared(tmp_path)
    assert (again.index, again.findings) == (first.index, first.findings)
    with pytest.raises(
        UserError, match="holds shards that were prepared with quality=92; give another folder"
    ):
        prepared(tmp_path, quality=50)
    source = open_source(str(tmp_path / "in"))
    with pytest.raises(UserError, match="--seekable needs"):  # The other split is to be written.
        prepare_splits(source, tmp_path / "out", PrepareOptions(shards=1, seekable=True))


def test_a_program_that_fails_or_complains_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for script in ("exit 1", "cat; exit 2", "cat; echo a warning >&2", "exec sleep 0"):
        program = write(tmp_path / seekable.PROGRAM, f"#!/bin/sh\n{script}\n".encode())
        program.chmod(0o755)
        assert make_seekable(original()) is None


@needs_jpegtran
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"quality": 30}])
def test_jpegtran_writes_what_can_be_cut(options: dict[str, object]) -> None:
    for picture in (PHOTO, PHOTO.convert("L")):
        data = jpeg(picture, **({"subsampling": "4:2:0"} | METADATA | options))
        found = make_seekable(data)
        assert found is not None
        assert np.array_equal(simplejpeg.decode_jpeg(found), simplejpeg.decode_jpeg(data))
        with Image.open(io.BytesIO(found)) as image:
            assert image.getexif() == EXIF
            assert image.info["icc_profile"] == METADATA["icc_profile"]
