"""Encoded bytes → pixels, height x width x channels, uint8."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

MAX_PIXELS = 80_000_000  # a larger image is refused: a small file can claim to be any size


def decode_image(data: bytes, channels: int) -> Pixels:
    """(H, W, channels) uint8. Raises ValueError where the bytes are not an image that can be read."""
    if simplejpeg.is_jpeg(data):
        try:
            return _decode_jpeg(data, channels)
        except ValueError:
            pass  # CMYK, or an error that Pillow may forgive
    return _decode_other(data, channels)


def _decode_jpeg(data: bytes, channels: int) -> Pixels:
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(height, width)
    pixels: Pixels = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB")
    return pixels


def _decode_other(data: bytes, channels: int) -> Pixels:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image.height, image.width)
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # Pillow's plugins raise whatever their format's parser does
        raise ValueError(f"not a readable image: {type(error).__name__}: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels are more than {MAX_PIXELS:,}")
