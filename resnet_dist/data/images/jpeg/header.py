"""The header of a JPEG: its size, how it is stored, and how a viewer turns it. Nothing is decoded.

Layout: ITU-T T.81, Annex B. A JPEG is a row of markers (0xFF and a code), most of them followed by a length and content.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ..metadata import exif_orientation
from .seekable import TABLE_MARKER, TABLE_NAME

MAX_HEADER_BYTES = 4096  # Remember no longer header: it holds a thumbnail or a color profile.
START_OF_SCAN = 0xDA
# Baseline and extended sequential with Huffman codes: these two can be decoded by rows.
SEQUENTIAL_FRAMES = (0xC0, 0xC1)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_segment, _size = struct.Struct(">BBH").unpack_from, struct.Struct(">HHB").unpack_from


class JpegHeader(NamedTuple):
    """The facts that decoding needs; height and width are of the stored pixels, before `orientation`."""

    height: int
    width: int
    components: int  # 1 gray, 3 color, 4 CMYK
    orientation: int  # EXIF's, 1 to 8
    table_at: int = 0  # the position of the table of a seekable JPEG (seekable.py); 0: it is none


# Remember the newest header with its bytes: the images of a data set often begin with the same ones, and parsing
# them in Python takes as long as decoding a small image. It is one tuple, so that threads replace it atomically.
_newest: tuple[bytes, JpegHeader | None] = (b"\0", None)


def read_header(data: bytes) -> JpegHeader | None:
    """Return the facts in the markers before the first scan; None where they are missing or unreliable."""
    global _newest
    start, known = _newest
    if data.startswith(start):
        return known
    header, num_bytes = parse_header(data)
    if header is not None and num_bytes <= MAX_HEADER_BYTES:
        _newest = data[:num_bytes], header
    return header


def parse_header(data: bytes) -> tuple[JpegHeader | None, int]:
    """Return the header, and the number of leading bytes that determine it."""
    at, end, orientation, table_at = 2, len(data), None, 0
    while at + 10 <= end:
        # Unpack all at once: this loop takes as long as a small image otherwise.
        first, marker, length = _segment(data, at)
        if first != 0xFF:
            break
        if marker in _FRAMES:
            height, width, components = _size(data, at + 5)
            if height == 0 or width == 0:
                return None, at
            return JpegHeader(height, width, components, orientation or 1, table_at), at + 10
        if marker == 0xFF:  # padding
            at += 1
            continue
        # Read the first block only: a block of more than 64 KiB continues in others, which look the same.
        if marker == 0xE1 and orientation is None and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = exif_orientation(data[at + 4 : at + 2 + length]) or 1
        elif marker == TABLE_MARKER and data.startswith(TABLE_NAME, at + 4):
            table_at = at
        at += 2 + max(2, length)
    return None, at


class JpegLayout(NamedTuple):
    """The storage of a JPEG's coefficients, on which the memory that decoding takes depends."""

    is_huffman: bool  # otherwise arithmetic codes, which are shorter than a bit
    # Rows of pixels can be decoded one after another. Otherwise, as in a progressive JPEG, libjpeg keeps all
    # coefficients in memory, at any scale.
    is_by_rows: bool


def parse_layout(data: bytes) -> JpegLayout:
    """Read the markers up to the first scan."""
    at, frame, components = 2, 0, 0
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker in _FRAMES:
            frame, components = marker, data[at + 9]
        if marker == START_OF_SCAN:
            # A scan of fewer components is followed by others.
            return JpegLayout(frame < 0xC8, frame in SEQUENTIAL_FRAMES and data[at + 4] == components)
        at += 2 + max(2, length)
    return JpegLayout(True, False)
