"""Every format that Pillow reads: the first bytes decide, and the pixels are those of Image.open(f).convert("RGB")."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, features

from resnet_dist.data.images import formats, pillow_decode
from resnet_dist.data.images.formats import describe, format_of, jpeg2000_tiles, jxl_size
from tests.data.conftest import decode_image
from tests.data.images.pictures import photo, saved

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
needs_jpeg2000 = pytest.mark.skipif(
    not features.check("jpg_2000"), reason="Pillow was built without JPEG 2000"
)
MODES = {
    "GIF": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"),
    "PPM": ("1", "L", "RGB"),
    "BMP": ("1", "L", "P", "RGB"),
    "AVIF": ("L", "RGB"),
    "JPEG2000": ("L", "RGB"),
}
WITHOUT = {"AVIF": "avif", "JPEG2000": "jpg_2000"}
KINDS = [
    pytest.param(
        form, mode, marks=pytest.mark.skipif(not features.check(WITHOUT.get(form, "zlib")), reason="codec")
    )
    for form, modes in MODES.items()
    for mode in modes
]


def as_pillow_does(data: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


@pytest.mark.parametrize(("form", "mode"), KINDS)
def test_every_format_has_the_pixels_that_pillow_shows(form: str, mode: str) -> None:
    data = saved(photo(24, 33).convert(mode), form)
    assert format_of(data) == getattr(formats, form)
    assert np.array_equal(decode_image(data, 3), as_pillow_does(data))
    assert decode_image(data, 1).shape == (24, 33, 1)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"])
def test_compressed_tiff(compression: str) -> None:
    data = saved(photo(40, 70), "TIFF", compression=compression)
    assert np.array_equal(decode_image(data, 3), as_pillow_does(data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_as_its_tag_says(orientation: int) -> None:
    picture = photo(12, 17)
    turned = as_pillow_does(saved(picture, "TIFF", tiffinfo={274: orientation}))
    data = saved(picture, "TIFF", tiffinfo={274: orientation})
    assert np.array_equal(decode_image(data, 3), turned)
    assert turned.shape[:2] == ((12, 17) if orientation < 5 else (17, 12))


def test_of_several_frames_the_first_is_used() -> None:
    first, second = photo(16, 16), Image.new("RGB", (16, 16), "red")
    for form in ("GIF", "TIFF", "WEBP", "PNG"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = saved(first, form, save_all=True, append_images=[second], **options)
        assert np.array_equal(decode_image(data, 3), as_pillow_does(data)), form
        assert np.abs(decode_image(data, 3).astype(int) - np.asarray(first)).mean() < 20, form


def test_16_bits_of_tiff_and_pgm_keep_their_upper_half() -> None:
    wide = np.tile(np.arange(0, 65536, 256, dtype=np.uint16) + 128, (4, 1))
    expected = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    for data in (
        saved(Image.fromarray(wide), "TIFF"),
        saved(Image.fromarray(wide.astype(">u2")), "TIFF"),
        b"P5 256 4 65535\n" + wide.astype(">u2").tobytes(),
    ):
        assert np.array_equal(decode_image(data, 1)[..., 0], expected)
        assert np.array_equal(decode_image(data, 3)[..., 1], expected)
    color = np.repeat(wide[..., None], 3, axis=2)
    assert (
        np.abs(
            decode_image(b"P6 256 4 65535\n" + color.astype(">u2").tobytes(), 3)[..., 1]
            - expected.astype(int)
        ).max()
        <= 1
    )


def test_12_bits_of_a_tiff_are_scaled_to_8() -> None:
    """Two samples share three bytes. Pillow alone shows values above 255 as white."""
    samples = np.arange(0, 4096, 16, dtype=np.uint16).reshape(2, 128)
    packed = b"".join(
        bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in samples.reshape(-1, 2).tolist()
    )
    tags = [
        (256, 128),
        (257, 2),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 2),
        (279, len(packed)),
    ]
    data = tiff(tags, packed)
    assert np.array_equal(decode_image(data, 1)[..., 0], np.arange(256).reshape(2, 128))


def tiff(tags: list[tuple[int, int]], pixels: bytes) -> bytes:
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    table = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + table


@pytest.mark.parametrize(
    ("picture", "kind"),
    [
        (Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "32-bit floats"),
        (Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)), "32-bit integers"),
    ],
)
def test_samples_without_a_known_white_are_refused(picture: Image.Image, kind: str) -> None:
    with pytest.raises(ValueError, match=f"a TIFF of {kind} .*no value is known to be white"):
        decode_image(saved(picture, "TIFF"), 3)


@pytest.mark.parametrize("form", ["TIFF", "AVIF", "JPEG2000", "WEBP"])
def test_transparent_pixels_are_white_in_every_format(form: str) -> None:
    rgba = np.zeros((8, 12, 4), np.uint8)
    rgba[:, :6] = (255, 0, 0, 255)
    rgba[:, 6:] = (0, 0, 255, 0)
    options = {"WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    if not features.check(WITHOUT.get(form, "zlib")):
        pytest.skip("the codec is missing")
    found = decode_image(saved(Image.fromarray(rgba), form, **options.get(form, {})), 3)
    assert np.abs(found[:, :5].astype(int) - (255, 0, 0)).max() <= 2
    assert (found[:, 7:] >= 253).all()


def test_a_transparent_color_of_a_gif_is_white() -> None:
    picture = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    picture.putpalette([10, 20, 30, 200, 100, 50])
    found = decode_image(saved(picture, "GIF", transparency=1), 3)
    assert found.tolist() == [[[10, 20, 30], [255] * 3], [[255] * 3, [10, 20, 30]]]


RGBA_MASKS, RGBX_MASKS = (0xFF0000, 0xFF00, 0xFF, 0xFF000000), (0xFF0000, 0xFF00, 0xFF, 0)


def bmp(header_size: int, compression: int, masks: tuple[int, ...], pixels_BGRA: np.ndarray) -> bytes:
    height, width = pixels_BGRA.shape[:2]
    body = pixels_BGRA[::-1].tobytes()
    header = struct.pack(
        "<IiiHHIIiiII", header_size, width, height, 1, 32, compression, len(body), 0, 0, 0, 0
    )
    if header_size > 40:
        header += struct.pack("<4I", *masks)
        header += bytes(header_size - len(header))
    elif compression == 3:
        header += struct.pack("<3I", *masks[:3])
    offset = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + header + body


@pytest.mark.parametrize(
    ("header_size", "compression", "masks", "alpha"),
    [
        (40, 0, RGBX_MASKS, 0),
        (40, 3, RGBX_MASKS, 0),
        (56, 3, RGBA_MASKS, 0),
        (108, 3, RGBA_MASKS, 0),
        (124, 3, RGBA_MASKS, 0),
        (124, 3, RGBX_MASKS, 0),
        (124, 0, RGBA_MASKS, 0),
        (108, 3, RGBX_MASKS, 77),
        (108, 3, (0, 0, 0, 0), 77),  # Pillow takes the fourth byte for alpha here.
    ],
)
def test_a_fourth_byte_of_a_bmp_that_is_no_alpha_hides_nothing(
    header_size: int, compression: int, masks: tuple[int, ...], alpha: int
) -> None:
    pixels = np.full((5, 6, 4), (30, 90, 200, alpha), np.uint8)
    found = decode_image(bmp(header_size, compression, masks, pixels), 3)
    assert (found == (200, 90, 30)).all()


def test_alpha_of_a_bmp_that_varies_is_alpha() -> None:
    pixels = np.full((4, 6, 4), (30, 90, 200, 255), np.uint8)
    pixels[:2, :, 3] = 0
    found = decode_image(bmp(124, 3, RGBA_MASKS, pixels), 3)
    assert (found[:2] == 255).all()
    assert (found[2:] == (200, 90, 30)).all()


def test_a_tiff_whose_alpha_is_0_everywhere_is_opaque() -> None:
    picture = photo(8, 9)
    hidden = picture.copy()
    hidden.putalpha(0)
    assert np.array_equal(decode_image(saved(hidden, "TIFF"), 3), np.asarray(picture))


IMPOSTORS = {
    b"": "an empty file",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n": "a Git LFS pointer",
    b"../../.git/annex/objects/Xk/1/SHA256E-s1--a.jpg/SHA256E-s1--a.jpg": "a git-annex pointer",
    b"/annex/objects/MD5E-s123--abc.jpg\n": "a git-annex pointer",
    b"<!DOCTYPE html>\n<html><head><title>404</title>": "an HTML page",
    b"\n\n <html lang='en'>": "an HTML page",
    b"<!-- saved from url --><html>": "an HTML page",
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "an XML or SVG file",
    b'{"message": "Not Found"}': "a JSON file",
    b"404: Not Found": "a text file",
    bytes(5000): "a file of zeros",
    b"\x1f\x8b\x08" + bytes(20): "a gzip file",
    b"PK\x03\x04" + bytes(20): "a zip file",
    b"%PDF-1.7": "a PDF",
    b"\0\0\0\x20ftypisom\0\0\2\0isomiso2mp41": "a video",
    b"\0\0\1\0\1\0\x10\x10": "an icon",
    b"\x93NUMPY\1\0": "a NumPy array",
    b"\xde\xad\xbe\xef" * 20: "not an image that is known here (it begins with",
}


@pytest.mark.parametrize("data", IMPOSTORS, ids=IMPOSTORS.values())
def test_a_file_that_is_no_image_is_called_what_it_is(data: bytes) -> None:
    assert format_of(data) is None
    assert describe(data).startswith(IMPOSTORS[data])
    with pytest.raises(ValueError, match="not a readable image: ") as refusal:
        decode_image(data, 3)
    assert IMPOSTORS[data] in str(refusal.value)


@pytest.mark.parametrize("form", ["GIF", "TIFF", "PPM", "BMP", "PNG", "WEBP", "JPEG"])
def test_a_damaged_image_is_named_by_its_format_and_not_by_an_address_in_memory(form: str) -> None:
    data = saved(photo(20, 20), form)
    for cut in (len(data) // 2, 30):
        with pytest.raises(ValueError, match=f"not a readable image: damaged {form}") as refusal:
            decode_image(data[:cut], 3)
        assert "object at 0x" not in str(refusal.value)


@pytest.mark.parametrize("form", ["eps", "pcx", "tga", "sgi", "ico"])
def test_other_formats_of_pillow_are_refused(form: str) -> None:
    with pytest.raises(ValueError, match="not a readable image: (not an image that is known here|a|an) "):
        decode_image(saved(photo(16, 16), form), 3)


@pytest.fixture
def fresh_openers() -> Iterator[None]:
    pillow_decode._opener.cache_clear()
    yield
    pillow_decode._opener.cache_clear()


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
JXL = b"\xff\x0a" + bytes(40)


@pytest.mark.parametrize(
    ("data", "module", "message"),
    [
        (HEIC, "pillow_heif", "a HEIF image, which needs pillow-heif"),
        (JXL, "pillow_jxl", "a JXL image, which needs pillow-jxl-plugin"),
        (
            b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(40),
            "PIL.AvifImagePlugin",
            "an AVIF image, which needs",
        ),
    ],
)
def test_a_plug_in_that_is_missing_is_named(
    data: bytes, module: str, message: str, monkeypatch: pytest.MonkeyPatch, fresh_openers: None
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            decode_image(data, 3)


@pytest.mark.parametrize(("form", "module"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
def test_formats_of_plug_ins_are_read(form: str, module: str) -> None:
    plugin = pytest.importorskip(module)
    if form == "HEIF":
        plugin.register_heif_opener()
    data = saved(photo(24, 33), form)
    assert format_of(data) == getattr(formats, form)
    assert np.array_equal(decode_image(data, 3), as_pillow_does(data))


def jxl_header(*fields: tuple[int, int]) -> bytes:
    """Return the beginning of a JPEG XL from (value, bits) pairs, the lowest bits first."""
    value, at = 0, 0
    for field, bits in fields:
        value |= field << at
        at += bits
    return b"\xff\x0a" + value.to_bytes(20, "little")


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ([(1, 1), (2, 5), (0, 3), (3, 5)], (24, 32)),
        ([(1, 1), (31, 5), (1, 3)], (256, 256)),
        ([(0, 1), (1, 2), (1079, 13), (5, 3)], (1080, 1920)),
        ([(0, 1), (3, 2), (99_999, 30), (0, 3), (2, 2), (199_999, 18)], (100_000, 200_000)),
    ],
)
def test_the_size_of_a_jpeg_xl_is_in_its_first_bytes(
    fields: list[tuple[int, int]], size: tuple[int, int]
) -> None:
    """Its plug-in decodes at once, whatever the size, so the size must be known before."""
    stream = jxl_header(*fields)
    box = struct.pack(">I", len(stream) + 8) + b"jxlc" + stream
    assert jxl_size(stream) == size
    assert jxl_size(b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl " + box) == size
    assert jxl_size(b"\0\0\0\x0cJXL \r\n\x87\n") is None


@needs_jpeg2000
def test_a_jpeg_2000_cannot_claim_more_tiles_than_its_bytes_hold() -> None:
    data = bytearray(saved(photo(16, 16), "JPEG2000", no_jp2=True))
    assert jpeg2000_tiles(bytes(data)) == 1
    at = data.index(b"\xff\x51")
    struct.pack_into(">IIIIIIII", data, at + 6, 255, 255, 0, 0, 1, 1, 0, 0)
    assert jpeg2000_tiles(bytes(data)) == 255 * 255
    with pytest.raises(ValueError, match="cannot hold as many tiles"):
        decode_image(bytes(data), 3)


def test_what_pillow_warns_of_is_not_shown() -> None:
    """A TIFF with a damaged date, which Pillow warns of, has its pixels and no warning, whatever the filters are."""
    data = saved(photo(8, 8), "TIFF", tiffinfo={306: "2024:01:01 00:00:00"})
    at = data.index(struct.pack("<HHI", 306, 2, 20)) + 4
    data = data[:at] + struct.pack("<II", 10_000, 0) + data[at + 8 :]
    for action in ("error", "always"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter(action)  # type: ignore[arg-type]
            found = decode_image(data, 3)
        assert not caught
        assert np.array_equal(found, np.asarray(photo(8, 8)))


# Small files, and the checksum of the pixels that earlier versions decoded: they must stay as they are.
PINNED = {
    "jpeg": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//wAARCAALAA4DASIAAhEBAxEB/8QAHwAAAQUBAQEBAQEAAAAAAAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQIDAAQRBRIhMUEGE1FhByJxFDKBkaEII0KxwRVS0fAkM2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVWV1hZWmNkZWZnaGlqc3R1dnd4eXqDhIWGh4iJipKTlJWWl5iZmqKjpKWmp6ipqrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3+Pn6/8QAHwEAAwEBAQEBAQEBAQAAAAAAAAECAwQFBgcICQoL/8QAtREAAgECBAQDBAcFBAQAAQJ3AAECAxEEBSExBhJBUQdhcRMiMoEIFEKRobHBCSMzUvAVYnLRChYkNOEl8RcYGRomJygpKjU2Nzg5OkNERUZHSElKU1RVVldYWVpjZGVmZ2hpanN0dXZ3eHl6goOEhYaHiImKkpOUlZaXmJmaoqOkpaanqKmqsrO0tba3uLm6wsPExcbHyMnK0tPU1dbX2Nna4uPk5ebn6Onq8vP09fb3+Pn6/9oADAMBAAIRAxEAPwDdtI7XTskTKc1k3tkt1cNKrcGsu9kfj5j1rZ08k2qk1x4mrKjWare+uxwZ044dKlFH/9k=",
        ("83811583744dffd2", "7c7e8f1b50af3b18"),
    ),
    "jpeg, turned, with something behind its end": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/4QAiRXhpZgAATU0AKgAAAAgAAQESAAMAAAABAAYAAAAAAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//wAARCAALAA4DASIAAhEBAxEB/8QAHwAAAQUBAQEBAQEAAAAAAAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQIDAAQRBRIhMUEGE1FhByJxFDKBkaEII0KxwRVS0fAkM2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVWV1hZWmNkZWZnaGlqc3R1dnd4eXqDhIWGh4iJipKTlJWWl5iZmqKjpKWmp6ipqrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3+Pn6/8QAHwEAAwEBAQEBAQEBAQAAAAAAAAECAwQFBgcICQoL/8QAtREAAgECBAQDBAcFBAQAAQJ3AAECAxEEBSExBhJBUQdhcRMiMoEIFEKRobHBCSMzUvAVYnLRChYkNOEl8RcYGRomJygpKjU2Nzg5OkNERUZHSElKU1RVVldYWVpjZGVmZ2hpanN0dXZ3eHl6goOEhYaHiImKkpOUlZaXmJmaoqOkpaanqKmqsrO0tba3uLm6wsPExcbHyMnK0tPU1dbX2Nna4uPk5ebn6Onq8vP09fb3+Pn6/9oADAMBAAIRAxEAPwDdtI7XTskTKc1k3tkt1cNKrcGsu9kfj5j1rZ08k2qk1x4mrKjWare+uxwZ044dKlFH/9l0cmFpbGVy",
        ("bdf050716a89fcdd", "4129a648fd664eb3"),
    ),
    "png, transparent": (
        "iVBORw0KGgoAAAANSUhEUgAAAA4AAAALCAYAAABPhbxiAAAByklEQVR4nAXBS28SURgG4O99z2XOwADTNjCtaWJMbxv/hf/Hf+hGF5oYNybduCCGpDdLoUBhbufi8+DT569ijcLQGZ6XE17NZrg5K3l2LKzNG26bH/y++cKf22/4c7jlrn+lRIHOs1BZnegskOmWlntqWKhkyLQjUwuKUMFRYwRhR5ED9fS4qawGc9PyuOgxzhsO1ZouASFsmYVXOtHIMWOuPOs0RUJLfXWxOTVMcIyc2sBz12OWeZbS0fgek9CzTI5HvMGRuqQg0scI/fFyXWkJNKlDKRtW8ZnT9AwXtkSwHPl3mMgFj9Q1T+wMTEN2UVN/GDcVU08VDsz9E0btnLqdM7bP6HzBEAMp75GZEw7MJXs5QZMcdbFwp0mIFHv6AK56j2VfswkbrtBibv/xwT1ya+/R2oJe1QzioPFrUkV0bIXYY8SNFFxhgKUxfMkDH8s1noZzLgvDbbFEY0f0NNTh96Tq0bJWwpUe485O+DcbcVEM8VLWfB3suOcCzaBnN76jzzMErajl3p0mAt50rE3GtbN4GFouRHHpEvahocea0QApf2McakZNaBxUJVRMhghWsQN50MCuF+58Yp08ElpCHQgtSFoxCvkfRvrPzL2SHwMAAAAASUVORK5CYII=",
        ("4235966310d7f321", "5423e4632779480c"),
    ),
    "png, turned": (
        "iVBORw0KGgoAAAANSUhEUgAAAA4AAAALCAAAAABq7uO+AAAAGmVYSWZNTQAqAAAACAABARIAAwAAAAEABgAAAAAAANZnS2kAAACISURBVHicBcFLCsJADADQ/BpHWlDUlYh4Pw8tgoi4LNS2mUnie3jvyul8Ocbn8fzOSarKhJmAxISyFx02GB6kJUOuzNtBvIH2tbjcEITJqnc9NpdDRrTVbIXCHjJm1GVZWwIwp7zSbf5ZailKKO9sNk/G/Y6YUMb05TdVwdIAUWq42VqjegLGH8/NTnl0IAfhAAAAAElFTkSuQmCC",
        ("c6f62a583adbc0c0", "6af1335e783b771d"),
    ),
    "webp": (
        "UklGRmQAAABXRUJQVlA4IFgAAACwAQCdASoOAAsAAoBCJbACdACUZ304AOJkOnaoiuge9bwoFnDfPQVKpNUxvB+WEqrdCXz4tR4fbAk8Z+6f05Opf9S4bn5X1YZD/a4beHbm3lzHzQrSAAAA",
        ("ceb19e4f27eed0f3", "0d9a0c52ba4a5573"),
    ),
}


@pytest.mark.parametrize("kind", PINNED)
def test_pixels_of_earlier_versions_are_unchanged(kind: str) -> None:
    encoded, digests = PINNED[kind]
    data = base64.b64decode(encoded)
    found = tuple(
        hashlib.sha256(decode_image(data, channels).tobytes()).hexdigest()[:16] for channels in (1, 3)
    )
    assert found == digests
