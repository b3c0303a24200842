"""Pictures that look like photographs, as files of any format."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def photo(height: int, width: int, *, grain: int = 8) -> Image.Image:
    """Return smooth colors that change every `grain` pixels, as in a photograph."""
    shape = height // grain + 2, width // grain + 2, 3
    coarse = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", **({"quality": 90} | options))
    return buffer.getvalue()


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def huge_png(side: int = 10_000) -> bytes:
    """Return a PNG of `side` x `side` colored pixels, 100 million by default, whose few bytes have none of them."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
