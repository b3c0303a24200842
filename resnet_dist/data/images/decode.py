"""Encoded bytes → an opened image, of which pixels can be asked: of all of it, or of the part that a crop needs.

The header is read first, so that the caller can choose a crop before anything is decoded. Of a JPEG, only the crop
is decoded (jpeg/crops.py); a crop of at least twice the wanted size is decoded at 1/2, 1/4 or 1/8 of the scale.
"""

from __future__ import annotations

import simplejpeg

from . import formats
from .jpeg.crops import JpegImage
from .jpeg.header import parse_header, read_header
from .opened import Box, Image, Pixels, cut
from .pillow_decode import decode_with_pillow

# As config.data.reading.MAX_PIXELS, which a logged model's copy of this module cannot import; a test compares them.
MAX_PIXELS = 80_000_000


def open_image(data: bytes, channels: int, max_pixels: int = MAX_PIXELS) -> Image:
    """Read the header; an image that is not a JPEG is decoded at once.

    channels: 1 or 3. Raises ValueError where the bytes are not an image, or where decoding it takes more than
    `max_pixels`. A larger JPEG is accepted where a reduced scale, at which it has no more, suffices: its boxes are
    decoded at such scales alone. A progressive one is not, since all of it would be kept in memory.
    """
    header = read_header(data) if simplejpeg.is_jpeg(data) else None
    if header is None and formats.format_of(data) is formats.JPEG:
        header, _ = parse_header(data)
        # Decode it with Pillow, because something follows its end, but for a reduced scale, which is chosen later.
        if header is not None and header.height * header.width <= max_pixels:
            header = None
    if header is not None:
        return JpegImage(data, channels, header, max_pixels)
    return _Decoded(decode_with_pillow(data, channels, max_pixels))


def decoded(pixels_HWC: Pixels) -> Image:
    """Return pixels that something else has decoded, as an image to choose a box from."""
    return _Decoded(pixels_HWC)


def whole(image: Image) -> Pixels:
    """Return all of an image, (H, W, C), reduced by `image.min_scale`: at its own size but for huge JPEGs.

    The pixels are valid until this thread asks for those of the next image.
    """
    box = Box(0, 0, image.height, image.width)
    return image.pixels(box, min(image.height, image.width) // image.min_scale)


class _Decoded:
    """An image that is decoded as a whole, such as by Pillow: any but an ordinary JPEG."""

    min_scale = 1
    plain_jpeg = None

    def __init__(self, pixels_HWC: Pixels) -> None:
        self._pixels = pixels_HWC
        self.height, self.width = pixels_HWC.shape[:2]
        self.held_bytes = pixels_HWC.nbytes

    def prepare(self, box: Box, size: int) -> None:
        """Do nothing: the pixels are there."""

    def pixels(self, box: Box, size: int) -> Pixels:
        return cut(self._pixels, box)
