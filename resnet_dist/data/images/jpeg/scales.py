"""A whole JPEG at 1, 1/2, 1/4 or 1/8 of its scale, into memory that a thread keeps; the scales that a huge one allows."""

from __future__ import annotations

import threading

import numpy as np
import simplejpeg

from ..opened import MAX_SCALE, Pixels
from ..pillow_decode import too_many
from .header import JpegHeader, parse_layout

MAX_SCRATCH_BYTES = 32 * 2**20  # A thread keeps this much between images: fresh memory costs page faults.
# A block of 8 x 8 pixels takes one Huffman code of one bit at least: a JPEG of fewer bytes is cut off or a bomb.
MAX_JPEG_PIXELS_PER_BYTE = 512

_scratch = threading.local()


def thread_buffer(num_bytes: int) -> Pixels:
    """Return this thread's buffer, of at least `num_bytes`. Its previous content is lost."""
    buffer: Pixels | None = getattr(_scratch, "buffer", None)
    if buffer is None or len(buffer) < num_bytes:
        buffer = np.empty(num_bytes, np.uint8)
        if num_bytes <= MAX_SCRATCH_BYTES:
            _scratch.buffer = buffer
    return buffer


def decode_scaled(data: bytes | bytearray, height: int, width: int, space: str, scale: int) -> Pixels:
    """Decode a JPEG of this size at 1/`scale`, (ceil(H / scale), ceil(W / scale), C), into this thread's buffer."""
    height, width = shape = -(-height // scale), -(-width // scale)
    decoded: Pixels = simplejpeg.decode_jpeg(
        data,
        space,
        min_height=height,
        min_width=width,
        min_factor=scale,
        buffer=thread_buffer(height * width * (1 if space == "GRAY" else 3)),
    )
    if decoded.shape[:2] != shape:
        raise ValueError("decoded at another scale than asked for")
    return decoded


def find_min_scale(data: bytes, header: JpegHeader, max_pixels: int) -> int:
    """Return the least reduction at which a JPEG has no more than `max_pixels`. Raises ValueError where none helps."""
    layout, num_pixels = parse_layout(data), header.height * header.width
    is_larger, problem = num_pixels > max_pixels, too_many(header.height, header.width, max_pixels)
    if layout.is_huffman and len(data) * MAX_JPEG_PIXELS_PER_BYTE < num_pixels:
        claim = f"{problem}, and" if is_larger else f"{header.height} x {header.width} pixels are"
        raise ValueError(f"not a readable image: {claim} more than a JPEG of {len(data):,} bytes can hold")
    if not is_larger:
        return 1
    if not layout.is_by_rows:
        raise ValueError(
            f"{problem}, and all of a progressive JPEG is kept in memory; raise max_pixels to allow them"
        )
    for scale in (2, 4, MAX_SCALE):
        if -(-header.height // scale) * -(-header.width // scale) <= max_pixels:
            return scale
    raise ValueError(f"{problem}, at 1/{MAX_SCALE} of its scale too; raise max_pixels to allow them")
