"""Image formats by the first bytes of a file, and what a file is that holds no image.

The bytes decide, not the name: a GIF called `.jpg` is a GIF, as it is to a browser and to Pillow. Extensions only
say which members of a tar are meant as images, since a tar is not read to choose them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

HEAD_BYTES = 64  # enough to recognise every format and impostor below


@dataclass(frozen=True)
class Format:
    """An image format: Pillow's name of it, and its extensions, the usual one first."""

    name: str
    extensions: tuple[str, ...]
    plugin: str | None = (
        None  # the package that teaches Pillow the format, where Pillow itself does not know it
    )


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
    (TIFF, lambda head: head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))),
    (PPM, lambda head: re.match(rb"P[1-6][\s#]", head) is not None),
    (AVIF, lambda head: any(brand in (b"avif", b"avis") for brand in _brands(head))),
    (HEIF, lambda head: any(brand in _HEIF_BRANDS for brand in _brands(head))),
    (JPEG2000, lambda head: head.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"))),
    (JXL, lambda head: head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"))),
)

_IMPOSTORS: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), description)
    for pattern, description in (
        (rb"version https://git-lfs", "a Git LFS pointer, not the image (`git lfs pull` fetches it)"),
        (
            rb"(\.\./)*(\.git)?/?annex/objects/",
            "a git-annex pointer, not the image (`git annex get` fetches it)",
        ),
        (rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html|<head|<body)", "an HTML page"),
        (rb"(\xef\xbb\xbf)?\s*(<\?xml|<svg)", "an XML or SVG file"),
        (rb"\x1f\x8b", "a gzip file"),
        (rb"PK\x03\x04", "a zip file"),
        (rb"BZh", "a bzip2 file"),
        (rb"\xfd7zXZ\0", "an xz file"),
        (rb"\x28\xb5\x2f\xfd", "a zstd file"),
        (rb"%PDF-", "a PDF"),
        (rb"\x93NUMPY", "a NumPy array"),
        (rb"8BPS", "a Photoshop file"),
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
