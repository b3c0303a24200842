"""Limits on the size of an image: what may be larger, and headers that claim a size that their file cannot have."""

from __future__ import annotations

import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_dist.config import Data
from resnet_dist.config.data.reading import MAX_PIXELS
from resnet_dist.data.images import pillow_decode
from resnet_dist.data.images.crop import random_box, to_sizes
from resnet_dist.data.images.decode import open_image, whole
from resnet_dist.data.images.metadata import orient
from resnet_dist.data.images.opened import Box
from resnet_dist.data.images.view import middle
from tests.data.conftest import data_of, decode_image
from tests.data.images.pictures import jpeg, photo, saved

LIMIT = 100_000  # pixels, of the images below, which have 240,000
HEIGHT, WIDTH = 403, 597


def large(**options: object) -> bytes:
    return jpeg(photo(HEIGHT, WIDTH, grain=40), **options)


def shrunk(scale: int) -> np.ndarray:
    """Return what a JPEG of the picture shows at 1/`scale`, by Pillow's box filter."""
    picture = photo(HEIGHT, WIDTH, grain=40)
    return np.asarray(picture.reduce(scale)).astype(int)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": False, "optimize": True}])
def test_a_larger_baseline_jpeg_is_decoded_at_the_scale_that_fits(options: dict[str, object]) -> None:
    image = open_image(large(**options), 3, LIMIT)
    assert (image.height, image.width, image.min_scale) == (HEIGHT, WIDTH, 2)
    pixels = whole(image)
    assert pixels.shape == (202, 299, 3)
    assert np.abs(pixels - shrunk(2)).mean() < 3
    assert open_image(large(**options), 1, LIMIT).pixels(Box(0, 0, HEIGHT, WIDTH), 50).shape == (51, 75, 1)


def test_a_crop_of_a_larger_jpeg_equals_that_of_an_image_within_the_limit() -> None:
    data = large()
    limited, free = open_image(data, 3, LIMIT), open_image(data, 3)
    for size in (8, 30, 60):
        for draws in np.random.default_rng(size).random((20, 40)):
            box = random_box(HEIGHT, WIDTH, size, draws)
            if min(box.height, box.width) >= 2 * size:
                assert np.array_equal(limited.pixels(box, size), free.pixels(box, size).copy())


def test_a_crop_that_needs_the_full_scale_is_refused_with_the_way_out() -> None:
    image = open_image(large(), 3, LIMIT)
    with pytest.raises(
        ValueError, match=r"403 x 597 pixels are more than 100,000, and 300 pixels of .* raise max_pixels"
    ):
        image.pixels(middle(HEIGHT, WIDTH, 300, 1.0), 300)
    assert open_image(large(), 3, HEIGHT * WIDTH).min_scale == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_larger_jpeg_is_turned(orientation: int, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = photo(HEIGHT, WIDTH, grain=40).convert(mode)
    plain = whole(open_image(jpeg(picture), 3, LIMIT)).copy()
    for data in (jpeg(picture, exif=exif), jpeg(picture, exif=exif) + b"something behind its end"):
        image = open_image(data, 3, LIMIT)
        assert (image.height, image.width) == orient(
            np.zeros((HEIGHT, WIDTH, 1), np.uint8), orientation
        ).shape[:2]
        turned = whole(image)
        assert np.array_equal(turned, orient(plain, orientation))
        # A box of the turned image, at the same scale.
        part = image.pixels(Box(40, 80, 200, 160), 80)
        assert np.array_equal(part, whole(image)[20:120, 40:120])


def test_a_loader_reads_larger_jpegs(tmp_path: Path) -> None:
    class NoIndex:
        location = "nowhere"

    data = data_of(NoIndex(), crop="random-resized-crop", flip=False, image_size=40, max_pixels=LIMIT)  # type: ignore[arg-type]
    image = open_image(large(), 3, data.max_pixels)
    draws = list(np.random.default_rng(0).random((3, 40)))
    views = to_sizes(image, data, [*draws, None], [False] * 4, 40)
    assert [view.shape for view in views] == [(40, 40, 3)] * 4


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (lambda: large(progressive=True), "progressive JPEG is kept in memory; raise max_pixels"),
        (lambda: saved(photo(HEIGHT, WIDTH), "PNG"), "raise max_pixels to allow them"),
        (lambda: saved(photo(HEIGHT, WIDTH), "WEBP"), "raise max_pixels to allow them"),
        (lambda: saved(photo(HEIGHT, WIDTH), "TIFF"), "raise max_pixels to allow them"),
        (lambda: saved(photo(HEIGHT, WIDTH), "GIF"), "raise max_pixels to allow them"),
    ],
)
def test_other_larger_images_are_refused_and_allowed_by_a_larger_limit(data, problem: str) -> None:  # type: ignore[no-untyped-def]
    content = data()
    with pytest.raises(ValueError, match=f"403 x 597 pixels are more than 100,000.*{problem}"):
        open_image(content, 3, LIMIT)
    assert whole(open_image(content, 3, HEIGHT * WIDTH)).shape == (HEIGHT, WIDTH, 3)


def test_a_jpeg_that_is_too_large_at_the_smallest_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"403 x 597 pixels are more than 1,000, at 1/8 of its scale too"):
        open_image(large(), 3, 1000)


@pytest.mark.parametrize("form", ["PNG", "GIF", "TIFF", "BMP", "WEBP"])
def test_pillow_neither_warns_of_nor_refuses_what_the_limit_allows(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's limit is process-wide: it warns above, and refuses above twice as many pixels."""
    data = saved(photo(HEIGHT, WIDTH), form)
    for pillows_limit in (LIMIT, HEIGHT * WIDTH // 3):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(ValueError, match="pixels"):
                open_image(data, 3, pillows_limit)
            assert whole(open_image(data, 3, HEIGHT * WIDTH)).shape == (HEIGHT, WIDTH, 3)
        assert not caught


def jpeg_that_claims(height: int, width: int, **options: object) -> bytes:
    data = bytearray(jpeg(photo(16, 16), **options))
    at = data.index(b"\xff\xc2" if options else b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png_that_claims(height: int, width: int) -> bytes:
    data = bytearray(saved(photo(16, 16), "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def patched(
    form: str, mark: bytes, skip: int, layout: str, height: int, width: int, **options: object
) -> bytes:
    data = bytearray(saved(photo(16, 16), form, **options))
    struct.pack_into(layout, data, data.index(mark) + skip, width, height)
    return bytes(data)


def tiff_with_tiles(size: int, tile: int) -> bytes:
    content = zlib.compress(bytes(64))
    tags = [
        (256, size),
        (257, size),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, tile),
        (323, tile),
        (324, 8),
    ]
    tags.append((325, len(content)))
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(content))
        + content
        + struct.pack("<H", len(tags))
        + table
        + bytes(4)
    )


BOMBS = {
    "jpeg": lambda edge: jpeg_that_claims(edge, edge),
    "progressive jpeg": lambda edge: jpeg_that_claims(edge, edge, progressive=True),
    "jpeg with something behind its end": lambda edge: jpeg_that_claims(edge, edge) + b"trailer",
    "png": lambda edge: png_that_claims(edge, edge),
    "gif": lambda edge: patched("GIF", b"GIF8", 6, "<HH", edge, edge),
    "bmp": lambda edge: patched("BMP", b"BM", 18, "<ii", edge, edge),
    "tiff": lambda edge: tiff_with_tiles(edge, 16),
    "ppm": lambda edge: b"P6 %d %d 255\n" % (edge, edge),
}


# Pillow alone would decode the first: it has 80.1 million pixels. The last is a size that a whole machine cannot hold.
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("edge", [8950, 12_000, 65_000])
@pytest.mark.parametrize("kind", BOMBS)
def test_decompression_bombs_are_refused_before_they_are_decoded(kind: str, edge: int) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"{edge} x {edge} pixels are more than 80,000,000"):
        open_image(BOMBS[kind](edge), 3)
    assert time.perf_counter() - start < 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: jpeg_that_claims(8900, 8900), id="jpeg within the limit"),
        pytest.param(lambda: tiff_with_tiles(16, 32_768), id="tiff with one tile of a gigabyte"),
        pytest.param(
            lambda: patched("GIF", b",\0\0\0\0\x10\0", 5, "<HH", 65_535, 65_535), id="frame of a gif"
        ),
        pytest.param(
            lambda: b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0" + b"\xff\x3f\0\xff\x3f\0", id="webp"
        ),
        pytest.param(lambda: b"P3 8900 8900 255\n" + b"1 2 3 " * 100, id="plain ppm"),
        pytest.param(lambda: b"\xff\x0a" + (2**32 - 1).to_bytes(20, "little"), id="jpeg xl"),
    ],
)
def test_files_that_would_take_much_memory_are_refused_at_once(data) -> None:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    with pytest.raises(ValueError, match="pixels|damaged|needs"):
        decode_image(data(), 3)
    assert time.perf_counter() - start < 1


def test_a_flat_jpeg_of_few_bytes_for_its_size_is_read() -> None:
    """The bound on pixels per byte holds for the emptiest picture, in both kinds, with codes of the least length."""
    flat = Image.new("RGB", (4000, 2400), "gray")
    for options in ({"optimize": True}, {"progressive": True}, {"optimize": True, "subsampling": 0}):
        assert (whole(open_image(jpeg(flat, quality=5, **options), 3)) == 128).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16", "LA"])
def test_strips_of_a_large_image_are_as_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = photo(61, 47)
    if mode == "I;16":
        picture = Image.fromarray(np.arange(61 * 47, dtype=np.uint16).reshape(61, 47) * 20)
    elif mode.endswith("A"):
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    data = saved(picture if mode == "I;16" else picture.convert(mode), "PNG")
    for channels in (1, 3):
        at_once = decode_image(data, channels)
        with monkeypatch.context() as patch:
            patch.setattr(pillow_decode, "LARGE_PIXELS", 1000)
            patch.setattr(pillow_decode, "STRIP_PIXELS", 300)
            assert np.array_equal(decode_image(data, channels), at_once)


def test_the_default_is_80_million_pixels() -> None:
    assert MAX_PIXELS == 80_000_000
    assert Data.model_fields["max_pixels"].default == MAX_PIXELS
    assert open_image.__defaults__ == (MAX_PIXELS,)
