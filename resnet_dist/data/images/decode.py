"""Encoded bytes → pixels, height x width x channels, uint8: of a whole image, or of the part that a crop needs.

The crop is chosen first, from the header alone. Of a JPEG only its part is decoded (data/region.py), and one of
twice the wanted size or more at half the scale, a quarter or an eighth.
"""

from __future__ import annotations

import io
import struct
import threading
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from resnet_dist.data.images.jpeg_region import decode_region

Pixels = NDArray[np.uint8]

MAX_PIXELS = 80_000_000  # a larger image is refused: a small file can claim to be any size
LARGE_PIXELS = 8_000_000  # from here on one at a time, or many threads would need gigabytes
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # what Pillow may try: its other parsers need not meet strange bytes
MAX_SCALE = 8  # the strongest shrinking of JPEG's own inverse transform

SMALL_PIXELS = 128 * 128  # up to here a whole decode into fresh memory is the cheapest
END_OF_IMAGE = b"\xff\xd9"  # a file that was cut off is bad as a whole, wherever the crop lies
SCRATCH_BYTES = 32 * 2**20  # what a thread keeps between images: fresh memory costs a page fault every 4 KiB

MAX_START_BYTES = 4096  # of a header that is remembered; a longer one has a thumbnail or a colour profile

_scratch = threading.local()
_one_large_image = threading.RLock()  # a thread that falls back to Pillow holds it already


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Image(Protocol):
    """An encoded image whose header was read. Height and width are those a viewer shows."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def pixels(self, box: Box, size: int) -> Pixels:
        """(H, W, C) of `box`, which will be resized to `size` x `size`: shrunk by `scale_for` it where the
        box lies on that grid, and the format can. Good until this thread asks for the next image's.

        Raises ValueError where the bytes cannot be decoded.
        """
        ...


def open_image(data: bytes, channels: int) -> Image:
    """Read the header. Raises ValueError where the bytes are not an image, or one of more than MAX_PIXELS."""
    header = _jpeg_header(data) if simplejpeg.is_jpeg(data) else None
    if header is not None:
        _check_size(header.height, header.width)
        return _Jpeg(data, channels, header)
    return _Decoded(_decode_with_pillow(data, channels))


def whole(image: Image) -> Pixels:
    """All of an image. Good until this thread asks for the next image's pixels."""
    return image.pixels(Box(0, 0, image.height, image.width), max(image.height, image.width))


def _thread_buffer(num_bytes: int) -> Pixels:
    """Memory of this thread, of at least so many bytes; what was in it is lost."""
    buffer: Pixels | None = getattr(_scratch, "buffer", None)
    if buffer is None or len(buffer) < num_bytes:
        buffer = np.empty(num_bytes, np.uint8)
        if num_bytes <= SCRATCH_BYTES:
            _scratch.buffer = buffer
    return buffer


def scale_for(height: int, width: int, size: int) -> int:
    """1, 2, 4 or 8: how much a crop may shrink while it is decoded, and still be no smaller than it is wanted."""
    scale = 1
    while scale < MAX_SCALE and min(height, width) >= 2 * scale * size:
        scale *= 2
    return scale


class _Decoded:
    """An image that is not a JPEG: Pillow decodes it as a whole."""

    def __init__(self, pixels_HWC: Pixels) -> None:
        self._pixels = pixels_HWC
        self.height, self.width = pixels_HWC.shape[:2]

    def pixels(self, box: Box, size: int) -> Pixels:
        return _cut(self._pixels, box)


class _Jpeg:
    def __init__(self, data: bytes, channels: int, header: _JpegHeader) -> None:
        self._data, self._header = data, header
        self._channels, self._space = channels, "GRAY" if channels == 1 else "RGB"
        turned = header.orientation >= 5  # by a quarter: 5 to 8 exchange the axes
        self.height = header.width if turned else header.height
        self.width = header.height if turned else header.width

    def pixels(self, box: Box, size: int) -> Pixels:
        if self._header.height * self._header.width < LARGE_PIXELS:
            return self._pixels(box, size)
        with _one_large_image:
            return self._pixels(box, size)

    def _pixels(self, box: Box, size: int) -> Pixels:
        orientation = self._header.orientation
        try:
            if orientation == 1:
                return self._decode_part(box, scale_for(box.height, box.width, size))
            return _cut(_orient(self._decode(), orientation), box)
        except ValueError:
            # CMYK, or an error that Pillow may forgive
            return _cut(_decode_with_pillow(self._data, self._channels), box)

    def _decode_part(self, box: Box, scale: int) -> Pixels:
        header = self._header
        if scale > 1 and not any(edge % scale for edge in box):
            height, width = -(-header.height // scale), -(-header.width // scale)
            pixels = self._decode(min_height=height, min_width=width, min_factor=scale)
            if pixels.shape[:2] != (height, width):
                raise ValueError("decoded at another scale than asked for")
            return _cut(pixels, Box(*(edge // scale for edge in box)))
        part = decode_region(self._data, *box) if self._is_worth_cutting(box) else None
        return _cut(self._decode(), box) if part is None else part

    def _is_worth_cutting(self, box: Box) -> bool:
        header = self._header
        return (
            self._channels == header.components == 3
            and box != (0, 0, header.height, header.width)
            and header.height * header.width > SMALL_PIXELS
            and self._data.endswith(END_OF_IMAGE)
        )

    def _decode(self, **options: object) -> Pixels:
        pixels = self._header.height * self._header.width
        buffer = _thread_buffer(pixels * self._channels) if pixels > SMALL_PIXELS else None
        decoded: Pixels = simplejpeg.decode_jpeg(self._data, self._space, buffer=buffer, **options)
        return decoded


class _JpegHeader(NamedTuple):
    height: int
    width: int
    components: int  # 1 grey, 3 colour, 4 CMYK
    orientation: int  # EXIF's, 1 to 8


# The images of a set often come from one encoder, and begin with the same bytes: those of the newest header, and
# what they say. To read them in Python takes as long as decoding a small image. One tuple: threads replace it whole.
_newest: tuple[bytes, _JpegHeader | None] = (b"\0", None)


def _jpeg_header(data: bytes) -> _JpegHeader | None:
    """What the markers before the first scan say; None where they say nothing that can be relied on."""
    global _newest
    start, known = _newest
    if data.startswith(start):
        return known
    header, num_bytes = _parse_header(data)
    if header is not None and num_bytes <= MAX_START_BYTES:
        _newest = data[:num_bytes], header
    return header


def _parse_header(data: bytes) -> tuple[_JpegHeader | None, int]:
    """The header, and how many bytes say all of it."""
    at, end, orientation = 2, len(data), 1
    while at + 10 <= end and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # padding
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = struct.unpack_from(">HH", data, at + 5)
            if height == 0 or width == 0:
                return None, at
            return _JpegHeader(height, width, data[at + 9], orientation), at + 10
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _orientation(data[at + 4 : at + 2 + length])
        at += 2 + max(2, length)
    return None, at


def _orientation(exif: bytes) -> int:
    from PIL import Image as Pillow

    try:
        tags = Pillow.Exif()
        tags.load(exif)
        value = tags.get(0x0112, 1)
    except Exception:  # whatever a damaged block makes the parser raise: the pixels are good all the same
        return 1
    return value if value in range(1, 9) else 1


def _orient(pixels_HWC: Pixels, orientation: int) -> Pixels:
    """Stored pixels → as a viewer shows them."""
    if orientation >= 5:
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    down = orientation in (3, 4, 7, 8)  # of the result, axes exchanged or not
    right = orientation in (2, 3, 6, 7)
    return pixels_HWC[:: -1 if down else 1, :: -1 if right else 1]


def _decode_with_pillow(data: bytes, channels: int) -> Pixels:
    from PIL import Image as Pillow
    from PIL import ImageOps

    try:
        with Pillow.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.height, image.width)
            large = image.height * image.width >= LARGE_PIXELS
            with _one_large_image if large else nullcontext():
                image.load()
                pixels = _to_8_bits(ImageOps.exif_transpose(image), channels)
    except Exception as error:  # Pillow's plugins raise whatever their format's parser does
        raise ValueError(f"not a readable image: {type(error).__name__}: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _to_8_bits(image: object, channels: int) -> Pixels:
    from PIL import Image as Pillow

    assert isinstance(image, Pillow.Image)
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's conversion would clip at 255
        grey = (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return np.array(Pillow.fromarray(grey).convert(mode))
    if image.has_transparency_data:  # shows white, not the colour that happens to lie there
        rgba = image.convert("RGBA")
        ground = Pillow.new("RGBA", rgba.size, "white")
        image = Pillow.alpha_composite(ground, rgba)
    return np.array(image.convert(mode))  # a copy: torch warns of memory that cannot be written


def _cut(pixels_HWC: Pixels, box: Box) -> Pixels:
    return pixels_HWC[box.top : box.top + box.height, box.left : box.left + box.width]


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels are more than {MAX_PIXELS:,}")
