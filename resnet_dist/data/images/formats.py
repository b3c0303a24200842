"""Image formats by the first bytes of a file, and what a file is that holds no image.

The bytes decide, not the name: a GIF called `.jpg` is a GIF, as it is to a browser and to Pillow. Extensions only
say which members of a tar are meant as images, since a tar is not read to choose them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

HEAD_BYTES = 64  # enough to recognise every format and impostor below


@dataclass(frozen=True)
class Format:
    """An image format: Pillow's name of it, and its extensions, the usual one first."""

    name: str
    extensions: tuple[str, ...]
    # The package that teaches Pillow the format, where Pillow itself does not know it.
    plugin: str | None = None


JPEG = Format("JPEG", ("jpg", "jpeg", "jpe", "jfif", "jif"))
PNG = Format("PNG", ("png", "apng"))
WEBP = Format("WEBP", ("webp",))
BMP = Format("BMP", ("bmp", "dib"))
GIF = Format("GIF", ("gif",))
TIFF = Format("TIFF", ("tif", "tiff"))
PPM = Format("PPM", ("ppm", "pgm", "pbm", "pnm"))
AVIF = Format("AVIF", ("avif",))
JPEG2000 = Format("JPEG2000", ("jp2", "j2k", "jpf", "jpx", "j2c", "jpc"))
HEIF = Format("HEIF", ("heic", "heif", "hif"), plugin="pillow-heif")
JXL = Format("JXL", ("jxl",), plugin="pillow-jxl-plugin")
FORMATS = (JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM, AVIF, JPEG2000, HEIF, JXL)

# In the order of preference where a sample has several images, as webdataset's users list them ("jpg;png;…").
IMAGE_EXTENSIONS = tuple(extension for form in FORMATS for extension in form.extensions)

# Classic TIFF and BigTIFF, in both byte orders, and two that mix them up, which Pillow reads.
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*")
_BMP_HEADER_BYTES = (12, 16, 40, 52, 56, 64, 108, 124)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def _is_bmp(head: bytes) -> bool:
    return head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADER_BYTES


def _brands(head: bytes) -> tuple[bytes, ...]:
    """Return the brands of an ISO media file, the major one first; none where it is no such file."""
    if head[4:8] != b"ftyp":
        return ()
    end = min(int.from_bytes(head[:4]), len(head))
    return head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))


_TESTS: tuple[tuple[Format, Callable[[bytes], bool]], ...] = (
    (JPEG, lambda head: head.startswith(b"\xff\xd8\xff")),
    (PNG, lambda head: head.startswith(b"\x89PNG\r\n\x1a\n")),
    (WEBP, lambda head: head.startswith(b"RIFF") and head[8:12] == b"WEBP"),
    (BMP, _is_bmp),
    (GIF, lambda head: head.startswith((b"GIF87a", b"GIF89a"))),
    (TIFF, lambda head: head.startswith(_TIFF_STARTS)),
    (PPM, lambda head: re.match(rb"P[1-6][\s#]", head) is not None),
    (AVIF, lambda head: any(brand in (b"avif", b"avis") for brand in _brands(head))),
    (HEIF, lambda head: any(brand in _HEIF_BRANDS for brand in _brands(head))),
    (JPEG2000, lambda head: head.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"))),
    (JXL, lambda head: head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"))),
)

_IMPOSTORS: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), description)
    for pattern, description in (
        (rb"version https://git-lfs", "a Git LFS pointer, not the image (`git lfs pull` fetches it)"),
        (
            rb"(\.\./)*(\.git)?/?annex/objects/",
            "a git-annex pointer, not the image (`git annex get` fetches it)",
        ),
        (rb"(\xef\xbb\xbf)?\s*(<!--.*)?(<!doctype html|<html|<head|<body)", "an HTML page"),
        (rb"(\xef\xbb\xbf)?\s*(<\?xml|<svg)", "an XML or SVG file"),
        (rb"\x1f\x8b", "a gzip file"),
        (rb"PK\x03\x04", "a zip file"),
        (rb"BZh", "a bzip2 file"),
        (rb"\xfd7zXZ\0", "an xz file"),
        (rb"\x28\xb5\x2f\xfd", "a zstd file"),
        (rb"%PDF-", "a PDF"),
        (rb"\x93NUMPY", "a NumPy array"),
        (rb"8BPS", "a Photoshop file"),
        (rb"\0\0[\1\2]\0", "an icon"),
        (rb"P[Ff]\s", "a PFM image of floats, of which no value is known to be white"),
        (rb"qoif", "a QOI image, which cannot be read here"),
        (rb"\x76\x2f\x31\x01", "an OpenEXR image, which cannot be read here"),
        (rb"DDS ", "a DirectDraw texture"),
        (rb"RIFF....(AVI |WAVE)|\x1aE\xdf\xa3", "a video or sound file"),
        (rb"(\0\0..)ftyp", "a video"),
        (rb"\s*[{\[]", "a JSON file"),
        (rb"\0+$", "a file of zeros"),
        (rb"[\t\n\r\x20-\x7e]+$", "a text file"),
    )
)


def format_of(data: bytes) -> Format | None:
    """Return the format of a file by its first bytes; None where it is no image. HEAD_BYTES of it suffice."""
    head = bytes(data[:HEAD_BYTES])
    return next((form for form, test in _TESTS if test(head)), None)


def describe(data: bytes) -> str:
    """Return a noun phrase for a file that holds no image, by its first bytes: "an HTML page"."""
    head = bytes(data[:HEAD_BYTES])
    if not head:
        return "an empty file"
    known = next((description for pattern, description in _IMPOSTORS if pattern.match(head)), None)
    return known or f"not an image that is known here (it begins with {head[:8]!r})"


def jxl_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) from the header of a JPEG XL (ISO 18181-1), which its plug-in decodes without a limit."""
    at = 0
    if not data.startswith(b"\xff\x0a"):  # a container: find the box that holds the beginning of the image
        while at + 16 <= len(data) and data[at + 4 : at + 8] not in (b"jxlc", b"jxlp"):
            size = int.from_bytes(data[at : at + 4])
            at += int.from_bytes(data[at + 8 : at + 16]) if size == 1 else size or len(data)
        at += (16 if data[at : at + 4] == b"\0\0\0\1" else 8) + 4 * (data[at + 4 : at + 8] == b"jxlp")
    if data[at : at + 2] != b"\xff\x0a":
        return None
    bits = int.from_bytes(data[at + 2 : at + 18], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    is_small = take(1)

    def edge() -> int:
        return 8 * (take(5) + 1) if is_small else take((9, 13, 18, 30)[take(2)]) + 1

    height, ratio = edge(), take(3)
    across, down = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio]
    return height, (height * across // down if across else edge())


def jpeg2000_tiles(data: bytes) -> int:
    """Return the number of tiles in the header of a JPEG 2000 (ISO 15444-1, A.5.1), for each of which memory is taken."""
    at = data.find(b"\xff\x4f\xff\x51")  # the start of the code stream, and of its size segment
    if at < 0 or at + 40 > len(data):
        return 0
    right, bottom, _, _, width, height, left, top = struct.unpack_from(">8I", data, at + 8)
    if not width or not height:
        return 0
    across, down = -(-(right - left) // width), -(-(bottom - top) // height)
    return int(max(0, across) * max(0, down))
