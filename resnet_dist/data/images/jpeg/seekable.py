"""Cuts the part that a crop needs out of a seekable JPEG, so that nothing around it is decoded.

A seekable JPEG, as `prepare --seekable` writes it, is a baseline JPEG that any program reads. Restart markers divide
each of its rows of blocks into intervals of one length, and a segment that other programs skip holds the number of
bytes of every interval. Decoding begins anew at each marker: so a part is a JPEG of its own, made of the file's header,
with another height and width, and of the intervals that the crop needs, with their markers numbered anew.

No file is trusted. The frame, the distance of the markers, the table and the markers must fit together, or there is no
part, and the image is decoded whole. What lies in the intervals of the part is checked by the decoder.

Shapes: R rows of blocks, C intervals in each, N intervals in all. A block here is what the standard, ITU-T T.81, calls
a minimum coded unit: 8 x 8 pixels of color, or up to four times as many each way where color is stored more coarsely.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TABLE_MARKER = 0xE9  # an application segment (APP9), which other programs skip
TABLE_NAME = b"resnet-dist seek\0"
WIDTH_PIXELS = 32  # the width of an interval that is aimed at: narrower ones cost bytes, wider ones time
MIN_WIDTH_PIXELS = 16
MAX_SEGMENT_BYTES = 0xFFFF
MAX_INTERVALS = (MAX_SEGMENT_BYTES - 2 - len(TABLE_NAME)) // 2
_SEQUENTIAL_FRAMES, _RESTARTS, _SCAN = (0xC0, 0xC1), 0xDD, 0xDA
# The end of the scan's header, unless it is progressive: all coefficients in full precision.
_WHOLE_SCAN = b"\0\x3f\0"
_FIRST_RESTART, _END_OF_IMAGE = 0xFFD0, 0xFFD9


class Frame(NamedTuple):
    """The size of an image in pixels and of its blocks, and how many of these a row and a column have."""

    height: int
    width: int
    components: int
    block_height: int
    block_width: int

    @property
    def rows(self) -> int:
        return -(-self.height // self.block_height)

    @property
    def columns(self) -> int:
        return -(-self.width // self.block_width)


class Part(NamedTuple):
    """A JPEG that holds a box of another one: the size of its pixels, and where in them the box begins."""

    jpeg: bytearray
    height: int
    width: int
    top: int
    left: int


class _Layout(NamedTuple):
    frame: Frame
    frame_at: int  # the position of the frame's segment
    scan_at: int  # that of the first interval
    interval: int  # blocks
    lengths_N: NDArray[np.int64]  # bytes of each interval, without its marker
    ends_N: NDArray[np.int64]  # the position of the marker behind each


def cut_part(
    data: bytes, table_at: int, top: int, left: int, height: int, width: int, *, scale: int = 1
) -> Part | None:
    """Return a JPEG of the intervals that hold a box; None where the file is not what its table says.

    table_at: the position of the table's segment. The box is in pixels as stored. Pixels of the box are those of a whole
    decode at 1/`scale`, bit for bit: where color is stored more coarsely, the part holds the neighbours from which it is
    interpolated.
    """
    layout = read_layout(data, table_at)
    if layout is None:
        return None
    frame = layout.frame
    first_row, end_row = _range(top, height, frame.block_height, frame.block_height, frame.rows, scale)
    span = frame.block_width * layout.interval  # pixels
    per_row = frame.columns // layout.interval
    first, end = _range(left, width, frame.block_width, span, per_row, scale)
    part_height = min(frame.height, end_row * frame.block_height) - first_row * frame.block_height
    part_width = min(frame.width, end * span) - first * span
    ends_RC = layout.ends_N.reshape(frame.rows, per_row)[first_row:end_row, first:end]
    lengths_RC = layout.lengths_N.reshape(frame.rows, per_row)[first_row:end_row, first:end]
    view = memoryview(data)
    head = [view[:table_at], view[_end_of_segment(data, table_at) : layout.scan_at]]
    begins_R, ends_R = (ends_RC[:, 0] - lengths_RC[:, 0]).tolist(), (ends_RC[:, -1] + 2).tolist()
    if end - first == per_row:  # Rows follow each other.
        begins_R, ends_R = begins_R[:1], ends_R[-1:]
    jpeg = bytearray().join([*head, *[view[begin:end] for begin, end in zip(begins_R, ends_R, strict=True)]])
    num_head_bytes = len(head[0]) + len(head[1])
    _words(jpeg)[_ends(lengths_RC.ravel(), num_head_bytes)] = _markers(lengths_RC.size)
    frame_at = layout.frame_at - (layout.scan_at - num_head_bytes)  # The table before it is gone.
    struct.pack_into(">HH", jpeg, frame_at + 5, part_height, part_width)
    return Part(jpeg, part_height, part_width, top - first_row * frame.block_height, left - first * span)


def _range(start: int, length: int, block: int, span: int, count: int, scale: int) -> tuple[int, int]:
    """Return the first of `count` spans of pixels that a part needs along an axis, and the end of them.

    block: pixels of a block. One of more than 8 has fewer values of color than pixels, and each pixel depends on the
    nearest value on either side: the part reaches two values further, so that its own edge is never one of these. At
    a reduced scale a value covers as many times the pixels.
    """
    reach = block // 4 * scale if block > 8 else 0
    return max(0, start - reach) // span, min(count, -(-(start + length + reach) // span))


def read_layout(data: bytes, table_at: int) -> _Layout | None:
    """Return where the intervals of a seekable JPEG lie; None where table, header and markers do not fit together."""
    at, end, interval, frame_at = _end_of_segment(data, table_at), len(data), 0, 0
    frame: Frame | None = None
    while at + 10 <= end and data[at] == 0xFF:
        marker, after = data[at + 1], _end_of_segment(data, at)
        if marker in _SEQUENTIAL_FRAMES and frame is None:
            frame, frame_at = read_frame(data, at), at
        elif marker == _RESTARTS:
            interval = int.from_bytes(data[at + 4 : at + 6])
        elif marker == _SCAN:
            if frame is None or data[at + 4] != frame.components or data[after - 3 : after] != _WHOLE_SCAN:
                return None
            return _checked_layout(data, table_at, frame, frame_at, after, interval)
        at = after
    return None


def _checked_layout(
    data: bytes, table_at: int, frame: Frame, frame_at: int, scan_at: int, interval: int
) -> _Layout | None:
    if not interval or frame.columns % interval:
        return None
    count, names_end = frame.rows * (frame.columns // interval), table_at + 4 + len(TABLE_NAME)
    if _end_of_segment(data, table_at) != names_end + 2 * count:
        return None
    lengths_N = np.frombuffer(data, ">u2", count, names_end).astype(np.int64)
    ends_N = _ends(lengths_N, scan_at)
    # Compare the end first: then no position lies beyond it.
    if ends_N[-1] + 2 != len(data) or _words(data)[ends_N].tobytes() != _markers(count).tobytes():
        return None
    return _Layout(frame, frame_at, scan_at, interval, lengths_N, ends_N)


def read_frame(data: bytes, at: int) -> Frame | None:
    """Return the frame at a position; None where its pixels are not of 8 bits, or sampled in a way that is rare."""
    precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
    sampling = data[at + 11 : at + 10 + 3 * components : 3]
    if precision != 8 or not height or not width or len(sampling) != components:
        return None
    if components == 1:  # Its blocks are single whatever its sampling.
        return Frame(height, width, components, 8, 8)
    across, down = sampling[0] >> 4, sampling[0] & 15
    if components != 3 or across not in (1, 2, 4) or down not in (1, 2, 4) or sampling[1:] != b"\x11\x11":
        return None
    return Frame(height, width, components, 8 * down, 8 * across)


def choose_interval(frame: Frame) -> int | None:
    """Return the number of blocks between restart markers that suits an image; None where it has too many of them.

    The number divides a row, so that all rows begin alike; where a row has no other divisor, it is the row.
    """
    divisors = [
        blocks
        for blocks in range(1, frame.columns + 1)
        if frame.columns % blocks == 0
        and (blocks * frame.block_width >= MIN_WIDTH_PIXELS or blocks == frame.columns)
        and frame.rows * (frame.columns // blocks) <= MAX_INTERVALS
    ]
    # Compare ratios: half as wide as wanted is as good as twice as wide.
    return min(
        divisors,
        key=lambda blocks: abs(np.log(blocks * frame.block_width / WIDTH_PIXELS)),
        default=None,
    )


def with_table(data: bytes, header_end: int) -> bytes | None:
    """Return a JPEG with restart markers as a seekable one: with a table, put at `header_end`, a segment's beginning.

    Returns None where its markers are not at equal distances that divide a row, or an interval is too long.
    """
    scan_at = _scan_of(data)
    if scan_at is None:
        return None
    words = _words(data)[scan_at:]
    ends_N = scan_at + np.flatnonzero((words >= _FIRST_RESTART) & (words <= _END_OF_IMAGE))
    lengths_N = np.diff(ends_N, prepend=scan_at - 2) - 2
    num_bytes = 2 + len(TABLE_NAME) + 2 * len(lengths_N)
    if num_bytes > MAX_SEGMENT_BYTES or lengths_N.max(initial=0) > 0xFFFF or lengths_N.min(initial=0) < 0:
        return None
    head = struct.pack(">BBH", 0xFF, TABLE_MARKER, num_bytes) + TABLE_NAME
    marked = data[:header_end] + head + lengths_N.astype(">u2").tobytes() + data[header_end:]
    return marked if read_layout(marked, header_end) is not None else None


def _scan_of(data: bytes) -> int | None:
    """Return the position of the first scan's codes; None where there is no scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, at = data[at + 1], _end_of_segment(data, at)
        if marker == _SCAN:
            return at
    return None


def _end_of_segment(data: bytes, at: int) -> int:
    return at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))


def _ends(lengths_N: NDArray[np.int64], start: int) -> NDArray[np.int64]:
    """Return the position of the marker behind each interval; the first one begins at `start`."""
    return np.cumsum(lengths_N + 2) + (start - 2)


def _words(data: bytes | bytearray) -> NDArray[np.uint16]:
    """Return the two bytes at every position as a number."""
    return np.ndarray((len(data) - 1,), ">u2", data, 0, (1,))


@lru_cache(maxsize=64)
def _markers(count: int) -> NDArray[np.uint16]:
    """Return the markers behind `count` intervals: numbered modulo 8, and the end of the image."""
    markers_N = _FIRST_RESTART + np.arange(count) % 8
    markers_N[-1] = _END_OF_IMAGE
    return markers_N.astype(">u2")
