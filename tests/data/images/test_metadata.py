"""Damaged metadata costs no pixels: EXIF blocks of every format are mutated, and the pixels are compared."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, features

from resnet_dist.data.images.formats import JPEG, PNG, TIFF, WEBP
from resnet_dist.data.images.metadata import exif_orientation, orient, without_metadata
from tests.data.conftest import decode_image
from tests.data.images.pictures import photo, saved

NUM_MUTANTS = 300  # the mutants of each format
PICTURE = photo(20, 28)


def exif(orientation: int | None = 6) -> Image.Exif:
    """Return EXIF as a camera writes it: a name, a resolution, a time, a position."""
    tags = Image.Exif()
    if orientation is not None:
        tags[0x0112] = orientation
    tags[0x010F], tags[0x011A] = "a maker of cameras", 72.5
    tags.get_ifd(0x8769).update({0x9003: "2024:01:01 00:00:00", 0x829A: 0.01})
    tags.get_ifd(0x8825).update({1: "N", 2: (1.5, 2.5, 3.5)})
    return tags


def block(orientation: int | None = 6) -> bytes:
    return exif(orientation).tobytes().removeprefix(b"Exif\0\0")


def checksummed(data: bytes) -> bytes:
    """Return a PNG with the right checksum of its EXIF block."""
    at = data.index(b"eXIf")
    end = at + 4 + int.from_bytes(data[at - 4 : at])
    return data[:end] + struct.pack(">I", zlib.crc32(data[at:end])) + data[end + 4 :]


def tiff_spans(data: bytes) -> list[tuple[int, int]]:
    """Return where the metadata of Pillow's TIFF is: its EXIF and position blocks, and entries but for their tags."""
    order = "<" if data.startswith(b"II") else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, at)
    spans, pixels = [], 0
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, _, _, value = struct.unpack_from(order + "HHII", data, entry)
        if tag == 273:
            pixels = value
        if tag in (0x010F, 0x011A, 0x8769, 0x8825):
            spans.append((entry + 2, entry + 12))
        if tag in (0x8769, 0x8825):
            spans.append((value, value + 40))
    return [(low, min(high, pixels) if low < pixels else high) for low, high in spans]


def block_span(data: bytes, orientation: int | None = 6) -> list[tuple[int, int]]:
    at = data.index(block(orientation))
    return [(at, at + len(block(orientation)))]


FILES: dict[str, Callable[[], tuple[bytes, list[tuple[int, int]]]]] = {
    "jpeg": lambda: (data := saved(PICTURE, "JPEG", exif=exif()), block_span(data)),
    "jpeg, CMYK": lambda: (data := saved(PICTURE.convert("CMYK"), "JPEG", exif=exif()), block_span(data)),
    "jpeg, with something behind its end": lambda: (
        data := saved(PICTURE, "JPEG", exif=exif()) + b"trailer",
        block_span(data),
    ),
    "png": lambda: (data := saved(PICTURE, "PNG", exif=exif()), block_span(data)),
    "webp": lambda: (data := saved(PICTURE, "WEBP", lossless=True, exif=exif()), block_span(data)),
    "tiff": lambda: (data := saved(PICTURE, "TIFF", exif=exif()), tiff_spans(data)),
    # Pillow stores the orientation of an AVIF outside of EXIF. The position of the block precedes it.
    "avif": lambda: (
        data := saved(PICTURE, "AVIF", exif=exif()),
        [(low - 4, high) for low, high in block_span(data, orientation=None)],
    ),
}


def mutated(data: bytes, spans: list[tuple[int, int]], generator: random.Random) -> bytes:
    content = bytearray(data)
    for _ in range(generator.randint(1, 3)):
        low, high = generator.choice(spans)
        at = generator.randrange(low, high)
        length = min(generator.choice([1, 2, 4, 16, 64]), high - at)
        match generator.randrange(4):
            case 0:
                content[at] ^= 1 << generator.randrange(8)
            case 1:
                content[at : at + length] = generator.randbytes(length)
            case 2:
                content[at : at + length] = bytes(length)
            case 3:
                content[at : at + length] = b"\xff" * length
    return bytes(content)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_exif_block_costs_no_pixels(kind: str) -> None:
    if kind == "avif" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    data, spans = FILES[kind]()
    shown = decode_image(data, 3)
    assert shown.shape == (28, 20, 3)
    views = [orient(shown, orientation) for orientation in range(1, 9)]
    for number in range(NUM_MUTANTS):
        mutant = mutated(data, spans, random.Random(number))
        if kind == "png" and number % 2:
            mutant = checksummed(mutant)
        found = decode_image(mutant, 3)
        assert any(np.array_equal(found, view) for view in views), number


def little(*entries: tuple[int, int, int, int], count: int | None = None, extra: bytes = b"") -> bytes:
    """Return an EXIF block of (tag, type, number, value) entries, with another number of them where `count` is set."""
    table = b"".join(
        struct.pack("<HHIHH" if kind == 3 else "<HHII", tag, kind, number, value, *([0] if kind == 3 else []))
        for tag, kind, number, value in entries
    )
    return b"II*\0" + struct.pack("<IH", 8, count or len(entries)) + table + bytes(4) + extra


TURNED = (0x0112, 3, 1, 6)
GPS_0_0 = struct.pack("<HHHIII", 1, 2, 5, 3, 56, 0) + struct.pack("<6I", *[0] * 6)
BLOCKS = {
    "no TIFF": (b"\0\x08\0\x02\x01\x12\0\x03garbage", None),
    "empty": (b"", None),
    "with the prefix twice": (b"Exif\0\0Exif\0\0" + little(TURNED), 6),
    "0/0 as a position": (little(TURNED, (0x8825, 4, 1, 38), extra=GPS_0_0), 6),
    "a value beyond its end": (little(TURNED, (0x011A, 2, 2000, 4000)), 6),
    "cut off": (little(TURNED, count=9), 6),
    "cut off before the tag": (little(TURNED)[:16], None),
    "orientation 0": (little((0x0112, 3, 1, 0)), 1),
    "orientation 99": (little((0x0112, 3, 1, 99)), 1),
    "as a long integer": (little((0x0112, 4, 1, 8)), 8),
    "as text": (little((0x0112, 2, 1, 6)), None),
    "more values than one": (little((0x0112, 3, 2, 6)), 6),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_an_orientation_is_found_in_a_damaged_block(kind: str) -> None:
    content, orientation = BLOCKS[kind]
    assert exif_orientation(content) == orientation
    plain = {form: decode_image(saved(PICTURE, form, **options), 3) for form, options in LOSSLESS.items()}
    for form in LOSSLESS:
        found = decode_image(with_exif(form, content), 3)
        assert np.array_equal(found, orient(plain[form], orientation or 1)), form


LOSSLESS: dict[str, dict[str, object]] = {"PNG": {}, "WEBP": {"lossless": True}}


def with_exif(form: str, content: bytes) -> bytes:
    data = saved(PICTURE, form, **LOSSLESS[form])
    if form == "PNG":
        at = data.index(b"IDAT") - 4
        chunk = b"eXIf" + content
        return (
            data[:at]
            + struct.pack(">I", len(content))
            + chunk
            + struct.pack(">I", zlib.crc32(chunk))
            + data[at:]
        )
    data = saved(PICTURE, form, **LOSSLESS[form], exif=b"Exif\0\0" + little((0x0112, 3, 1, 1)))
    data = data[: data.index(b"EXIF")]
    data += b"EXIF" + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


def test_orientations_are_those_that_pillow_finds() -> None:
    generator = random.Random(0)
    for _ in range(500):
        tags = Image.Exif()
        for tag in generator.sample([0x010E, 0x010F, 0x0110, 0x0112, 0x011A, 0x0131, 0x0132], 4):
            tags[tag] = (
                generator.randrange(0, 12) if tag == 0x0112 else 72.5 if tag == 0x011A else "x" * (tag % 9)
            )
        tags.endian = generator.choice("<>")
        value = tags.get(0x0112)
        expected = None if value is None else value if value in range(1, 9) else 1
        assert exif_orientation(tags.tobytes()) == expected


def test_metadata_is_taken_out_and_the_pixels_stay() -> None:
    for form, mode in ((JPEG, "RGB"), (JPEG, "CMYK"), (PNG, "RGB"), (PNG, "P"), (WEBP, "RGBA"), (TIFF, "P")):
        options: dict[str, object] = {"exif": exif(None)}
        if form is not TIFF:
            options |= {"icc_profile": b"profile" * 100}
        if (form, mode) == (PNG, "P"):
            options |= {"transparency": 3}
        data = saved(PICTURE.convert(mode), form.name, **options)
        stripped = without_metadata(data, form)
        assert b"profile" not in stripped
        assert len(stripped) <= len(data)
        assert stripped != data
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(stripped))), np.asarray(Image.open(io.BytesIO(data)))
        )


def test_a_png_whose_text_is_too_long_for_pillow_is_read() -> None:
    text = b"zTXtparameters\0\0" + zlib.compress(bytes(3 * 2**20))
    data = saved(PICTURE, "PNG")
    at = data.index(b"IDAT") - 4
    data = (
        data[:at] + struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text)) + data[at:]
    )
    assert np.array_equal(decode_image(data, 3), np.asarray(PICTURE))


def test_damage_to_the_pixels_is_still_found() -> None:
    for form in ("PNG", "WEBP", "TIFF"):
        data = saved(PICTURE, form, exif=exif())
        with pytest.raises(ValueError, match=f"damaged {form}"):
            decode_image(data[: len(data) // 3], 3)
    data = bytearray(saved(PICTURE, "PNG", exif=exif()))
    data[data.index(b"IDAT") + 40] ^= 0xFF
    with pytest.raises(ValueError, match="damaged PNG"):
        decode_image(bytes(data), 3)
