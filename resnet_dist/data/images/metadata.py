"""The metadata around the pixels of an image file: reads the orientation in it, and takes it out.

Metadata must never cost pixels: other readers show an image whose EXIF block, color profile or comment is damaged.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import AVIF, HEIF, JPEG, PNG, TIFF, WEBP, Format

ORIENTATION = 0x0112  # tag of EXIF and TIFF
_EXIF_PREFIX = b"Exif\0\0"
_INTEGERS = {3: "H", 4: "I", 8: "h", 9: "i"}  # type of a tag → struct's code
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')

_JPEG_KEPT = (0xE0, 0xEE)  # JFIF and Adobe, which say how colors are stored
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_KEPT = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_WEBP_METADATA = 0x20 | 0x08 | 0x04  # flags of VP8X: color profile, EXIF, XMP
# Tags of TIFF on which pixels depend: those of TIFF 6.0's sections for images, and those of its extensions.
_TIFF_BASELINE = (
    254,
    *range(256, 260),
    262,
    266,
    273,
    ORIENTATION,
    *range(277, 280),
    284,
    292,
    293,
    320,
    338,
)
_TIFF_EXTENSIONS = (317, *range(322, 326), 332, 334, 339, 347, *range(512, 522), *range(529, 533))
_TIFF_KEPT = frozenset(_TIFF_BASELINE + _TIFF_EXTENSIONS)
# An entry of an ISO media file's table of items: version 2 or 3, flags, number of the item, protection, type.
_EXIF_ITEM = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", re.DOTALL)


def exif_orientation(block: bytes) -> int | None:
    """Return EXIF's orientation, 1 to 8; 1 where its value is another, None where the block is damaged or has none.

    Reads no other tag, so that damage to others does not matter: the layout is TIFF's, with or without a prefix.
    """
    while block.startswith(_EXIF_PREFIX):  # Some writers repeat it.
        block = block[len(_EXIF_PREFIX) :]
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, num_values = struct.unpack_from(order + "HHI", block, entry)
            if tag == ORIENTATION and kind in _INTEGERS and num_values:
                code = order + _INTEGERS[kind]
                # An entry that is too small for the values holds their position.
                fits = num_values * struct.calcsize(code) <= 4
                place = entry + 8 if fits else struct.unpack_from(order + "I", block, entry + 8)[0]
                (value,) = struct.unpack_from(code, block, place)
                return value if value in range(1, 9) else 1
    except struct.error:  # The block ends before the tag.
        pass
    return None


def orientation_of(info: Mapping[Any, Any]) -> int:
    """Return the orientation, 1 to 8, in the metadata that Pillow has read: EXIF's, or XMP's where it has none."""
    block = info.get("exif")
    if block is None and isinstance(
        text := info.get("Raw profile type exif"), str
    ):  # by ImageMagick, in a PNG
        try:
            block = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            block = None
    found = exif_orientation(block) if isinstance(block, bytes) else None
    if found is not None:
        return found
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp")
    if isinstance(xmp, str):
        xmp = xmp.encode(errors="replace")
    match = _XMP_ORIENTATION.search(xmp) if isinstance(xmp, bytes) else None
    return int(match[1]) if match and match[1] in b"12345678" else 1


def orient(pixels_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn and mirror stored pixels to those that a viewer shows."""
    if orientation >= 5:
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    reverse_rows = orientation in (3, 4, 7, 8)
    reverse_columns = orientation in (2, 3, 6, 7)
    return pixels_HWC[:: -1 if reverse_rows else 1, :: -1 if reverse_columns else 1]


def without_metadata(data: bytes, form: Format) -> bytes:
    """Return a file that holds the same pixels, and little else; the file itself where its format has no metadata."""
    return _STRIPPERS[form](data) if form in _STRIPPERS else data


def _strip_jpeg(data: bytes) -> bytes:
    kept, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xDA:  # The scan is next.
            break
        after = at + 2 + max(2, length)
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE  # application segments, comments
        if not is_metadata or marker in _JPEG_KEPT:
            kept.append(data[at:after])
        at = after
    return b"".join([*kept, data[at:]])


def _strip_png(data: bytes) -> bytes:
    kept, at = [data[:8]], 8
    while at + 8 <= len(data):
        kind, after = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        is_sound = int.from_bytes(data[after - 4 : after]) == zlib.crc32(data[at + 4 : after - 4])
        if kind in _PNG_KEPT or (kind == b"eXIf" and is_sound):
            kept.append(data[at:after])
        at = after
    return b"".join(kept)


def _strip_webp(data: bytes) -> bytes:
    kept, at = [b"WEBP"], 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        after = at + 8 + size + size % 2
        if kind in _WEBP_KEPT:
            chunk = bytearray(data[at:after])
            if kind == b"VP8X" and len(chunk) > 8:
                chunk[8] &= ~_WEBP_METADATA & 0xFF
            kept.append(bytes(chunk))
        at = after
    content = b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def _strip_tiff(data: bytes) -> bytes:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:  # BigTIFF, whose table has another layout
        return data
    try:
        (at,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, at)
        kept = []
        for first in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, num_values = struct.unpack_from(order + "HHI", data, first)
            is_damaged = tag == ORIENTATION and (kind, num_values) != (3, 1)
            if tag in _TIFF_KEPT and not is_damaged:
                kept.append(data[first : first + 12])
    except struct.error:
        return data
    table = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)  # No image follows this one.
    return data[:at] + table + data[at + len(table) :]


def _hide_exif_item(data: bytes) -> bytes:
    """Rename the EXIF item in an ISO media file's table: readers ignore types that they do not know."""
    return _EXIF_ITEM.sub(rb"\1skip", data)


_STRIPPERS: dict[Format, Callable[[bytes], bytes]] = {
    JPEG: _strip_jpeg,
    PNG: _strip_png,
    WEBP: _strip_webp,
    TIFF: _strip_tiff,
    AVIF: _hide_exif_item,
    HEIF: _hide_exif_item,
}
