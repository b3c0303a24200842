"""Writes JPEGs anew as seekable ones (data/images/jpeg/seekable.py): without loss, by libjpeg-turbo's `jpegtran`.

Pixels, EXIF, color profile and comments stay. An image is written anew only where its copy has been compared with it;
otherwise its own bytes are kept, and counted.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator

import numpy as np
import simplejpeg

from resnet_dist.data.images.formats import JPEG, format_of
from resnet_dist.data.images.jpeg.crops import SMALL_PIXELS
from resnet_dist.data.images.jpeg.header import JpegHeader, parse_header
from resnet_dist.data.images.jpeg.seekable import (
    choose_interval,
    cut_part,
    read_frame,
    read_layout,
    with_table,
)
from resnet_dist.data.images.opened import Pixels
from resnet_dist.errors import UserError

PROGRAM = "jpegtran"
TIMEOUT_SECONDS = 300
_COMMENT, _JFIF, _ADOBE, _SCAN = 0xFE, 0xE0, 0xEE, 0xDA
NOT_JPEG, SMALL, REFUSED = (
    "not a JPEG",
    "a small JPEG, which is decoded whole",
    "a JPEG that cannot be written anew without loss",
)


def check_program() -> None:
    """Raise UserError where the program is missing."""
    if shutil.which(PROGRAM) is None:
        raise UserError(
            f"--seekable needs libjpeg-turbo's program {PROGRAM}, which is not on PATH; install libjpeg-turbo-progs "
            "(Debian, Ubuntu), libjpeg-turbo-utils (Fedora) or jpeg-turbo (Homebrew)"
        )


def make_seekable(data: bytes) -> bytes | None:
    """Return an image as a seekable JPEG; None where it is none, is a small one, or its copy is not the same image."""
    header, frame_at = _header(data)
    if reason_unchanged(data) != REFUSED or header is None or not simplejpeg.is_jpeg(data):
        return None
    frame = read_frame(data, frame_at)
    interval = None if frame is None else choose_interval(frame)
    if interval is None:
        return None
    copy = _transform(data, interval)
    if copy is None or _metadata(copy) != _metadata(data):
        return None
    seekable = with_table(copy, _end_of_metadata(copy))
    return seekable if seekable is not None and _is_same_image(data, seekable) else None


def reason_unchanged(data: bytes) -> str | None:
    """Return why the bytes of an image are those that it had; None where they are a seekable JPEG."""
    if format_of(data) is not JPEG:
        return NOT_JPEG
    header, _ = _header(data)
    # Another program that copies the table and changes the rest makes a file that is decoded whole.
    if header is not None and header.table_at and read_layout(data, header.table_at) is not None:
        return None
    is_small = header is not None and header.height * header.width <= SMALL_PIXELS
    return SMALL if is_small else REFUSED


def _header(data: bytes) -> tuple[JpegHeader | None, int]:
    """Return the header, and the position of the frame in it."""
    header, end = parse_header(data)
    return header, end - 10


def _transform(data: bytes, interval: int) -> bytes | None:
    """Return a baseline JPEG of the same coefficients with restart markers; None where the program has any complaint."""
    # Compute the codes anew: those for any image would take 5 % more bytes.
    command = [PROGRAM, "-copy", "all", "-optimize", "-restart", f"{interval}B"]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 and not done.stderr else None


def _is_same_image(data: bytes, copy: bytes) -> bool:
    """Report whether two JPEGs have the same pixels, shown the same way, also where a part of the copy is decoded."""
    old, new = _header(data)[0], _header(copy)[0]
    if old is None or new is None or old._replace(table_at=0) != new._replace(table_at=0):
        return False
    try:
        # A large image takes much memory: keep one at a time.
        digest = _digest(simplejpeg.decode_jpeg(data, "RGB"))
        pixels = simplejpeg.decode_jpeg(copy, "RGB")
        top, left, height, width = new.height // 4, new.width // 4, new.height // 2, new.width // 2
        part = cut_part(copy, new.table_at, top, left, height, width)
        if part is None or _digest(pixels) != digest:
            return False
        found = simplejpeg.decode_jpeg(part.jpeg, "RGB")[part.top :, part.left :][:height, :width]
    except ValueError:  # It cannot be decoded, or has errors that Pillow alone tolerates.
        return False
    return np.array_equal(found, pixels[top : top + height, left : left + width])


def _digest(pixels: Pixels) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(pixels).data).digest()


def _metadata(data: bytes) -> list[bytes]:
    """Return all segments for applications and comments, but for two that describe the pixels: JFIF's and Adobe's."""
    return [
        data[at:end]
        for marker, at, end in _segments(data)
        if _is_metadata(marker) and marker not in (_JFIF, _ADOBE)
    ]


def _end_of_metadata(data: bytes) -> int:
    """Return the position of the first segment that decoding needs."""
    return next((at for marker, at, _ in _segments(data) if not _is_metadata(marker)), 2)


def _is_metadata(marker: int) -> bool:
    return _JFIF <= marker <= 0xEF or marker == _COMMENT


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the marker, position and end of each segment before the first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        end = at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))
        yield marker, at, end
        if marker == _SCAN:
            return
        at = end
