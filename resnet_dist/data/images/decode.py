"""Encoded bytes → pixels: of a whole image, or of the part that a crop needs.

The header is read first, so that the caller can choose a crop before anything is decoded. Of a JPEG, only the crop
is decoded (jpeg_region.py); a crop of at least twice the wanted size is decoded at 1/2, 1/4 or 1/8 of the scale.

Shapes: pixels are uint8, H height, W width, C channels.
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

MAX_PIXELS = 80_000_000  # Refuse larger images: a small file can claim to be of any size.
LARGE_PIXELS = 8_000_000  # Decode images from this size on one at a time: many threads would need gigabytes.
SMALL_PIXELS = 128 * 128  # Decode images up to this size whole, into fresh memory: it is the fastest way.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow tries no others: its rare parsers are a needless risk.
MAX_SCALE = 8  # the strongest reduction that JPEG's inverse transform offers
MAX_SCRATCH_BYTES = 32 * 2**20  # A thread keeps this much between images: fresh memory costs page faults.
MAX_HEADER_BYTES = 4096  # Remember no longer header: it holds a thumbnail or a color profile.
END_OF_IMAGE = b"\xff\xd9"

_scratch = threading.local()
# The lock is reentrant: a thread that falls back to Pillow may hold it already.
_one_large_image = threading.RLock()


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Image(Protocol):
    """An encoded image whose header has been read. Height and width are those that a viewer shows."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def pixels(self, box: Box, size: int) -> Pixels:
        """Return `box` as (H, W, C), to be resized to `size` x `size` by the caller.

        It is already shrunk by `scale_for`, where the box lies on the grid of that scale and the format allows it.
        The pixels are valid until this thread asks for those of the next image. Raises ValueError where the bytes
        cannot be decoded.
        """
        ...


def open_image(data: bytes, channels: int) -> Image:
    """Read the header; an image that is not a JPEG is decoded at once.

    channels: 1 or 3. Raises ValueError where the bytes are not an image, or one of more than MAX_PIXELS.
    """
    header = _jpeg_header(data) if simplejpeg.is_jpeg(data) else None
    if header is not None:
        _check_size(header.height, header.width)
        return _Jpeg(data, channels, header)
    return _Decoded(_decode_with_pillow(data, channels))


def whole(image: Image) -> Pixels:
    """Return all of an image, (H, W, C). The pixels are valid until this thread asks for those of the next image."""
    return image.pixels(Box(0, 0, image.height, image.width), max(image.height, image.width))


def _thread_buffer(num_bytes: int) -> Pixels:
    """Return this thread's buffer, of at least `num_bytes`. Its previous content is lost."""
    buffer: Pixels | None = getattr(_scratch, "buffer", None)
    if buffer is None or len(buffer) < num_bytes:
        buffer = np.empty(num_bytes, np.uint8)
        if num_bytes <= MAX_SCRATCH_BYTES:
            _scratch.buffer = buffer
    return buffer


def scale_for(height: int, width: int, size: int) -> int:
    """Return the factor by which a crop may shrink while it is decoded and stay at least `size`: 1, 2, 4 or 8."""
    scale = 1
    while scale < MAX_SCALE and min(height, width) >= 2 * scale * size:
        scale *= 2
    return scale


class _Decoded:
    """An image that Pillow has decoded as a whole: any but an ordinary JPEG."""

    def __init__(self, pixels_HWC: Pixels) -> None:
        self._pixels = pixels_HWC
        self.height, self.width = pixels_HWC.shape[:2]

    def pixels(self, box: Box, size: int) -> Pixels:
        return _cut(self._pixels, box)


class _Jpeg:
    """A JPEG of which each crop is decoded when it is asked for."""

    def __init__(self, data: bytes, channels: int, header: _JpegHeader) -> None:
        self._data, self._header = data, header
        self._channels, self._space = channels, "GRAY" if channels == 1 else "RGB"
        turned = header.orientation >= 5  # 5 to 8 turn the image by a quarter, which exchanges the axes
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
            # Let Pillow try: it decodes CMYK, and tolerates some errors.
            return _cut(_decode_with_pillow(self._data, self._channels), box)

    def _decode_part(self, box: Box, scale: int) -> Pixels:
        """Return `box` of an image without rotation, at 1/`scale` where it lies on the grid of that scale."""
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
        """Report whether `decode_region` can decode `box`, and does so faster than a whole decode."""
        header = self._header
        return (
            self._channels == header.components == 3
            and box != (0, 0, header.height, header.width)
            and header.height * header.width > SMALL_PIXELS
            # Decode a truncated file whole, which fails: it is bad wherever the crop lies.
            and self._data.endswith(END_OF_IMAGE)
        )

    def _decode(self, **options: object) -> Pixels:
        pixels = self._header.height * self._header.width
        buffer = _thread_buffer(pixels * self._channels) if pixels > SMALL_PIXELS else None
        decoded: Pixels = simplejpeg.decode_jpeg(self._data, self._space, buffer=buffer, **options)
        return decoded


class _JpegHeader(NamedTuple):
    """The facts that decoding needs; height and width are of the stored pixels, before `orientation`."""

    height: int
    width: int
    components: int  # 1 gray, 3 color, 4 CMYK
    orientation: int  # EXIF's, 1 to 8


# Remember the newest header with its bytes: the images of a data set often begin with the same ones, and parsing
# them in Python takes as long as decoding a small image. It is one tuple, so that threads replace it atomically.
_newest: tuple[bytes, _JpegHeader | None] = (b"\0", None)


def _jpeg_header(data: bytes) -> _JpegHeader | None:
    """Return the facts in the markers before the first scan; None where they are missing or unreliable."""
    global _newest
    start, known = _newest
    if data.startswith(start):
        return known
    header, num_bytes = _parse_header(data)
    if header is not None and num_bytes <= MAX_HEADER_BYTES:
        _newest = data[:num_bytes], header
    return header


def _parse_header(data: bytes) -> tuple[_JpegHeader | None, int]:
    """Return the header, and the number of leading bytes that determine it."""
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
    except Exception:  # The parser raises anything on a damaged block; the pixels are good all the same.
        return 1
    return value if value in range(1, 9) else 1


def _orient(pixels_HWC: Pixels, orientation: int) -> Pixels:
    """Turn and mirror stored pixels to those that a viewer shows."""
    if orientation >= 5:
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    reverse_rows = orientation in (3, 4, 7, 8)
    reverse_columns = orientation in (2, 3, 6, 7)
    return pixels_HWC[:: -1 if reverse_rows else 1, :: -1 if reverse_columns else 1]


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
    except Exception as error:  # Pillow's plugins raise any exception that their format's parser raises.
        raise ValueError(f"not a readable image: {type(error).__name__}: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _to_8_bits(image: object, channels: int) -> Pixels:
    from PIL import Image as Pillow

    assert isinstance(image, Pillow.Image)
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I"):
        # Keep the upper 8 of 16 bits: Pillow's own conversion would clip at 255.
        gray = (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return np.array(Pillow.fromarray(gray).convert(mode))
    if image.has_transparency_data:
        # Show white where the image is transparent, not the arbitrary color stored there.
        rgba = image.convert("RGBA")
        ground = Pillow.new("RGBA", rgba.size, "white")
        image = Pillow.alpha_composite(ground, rgba)
    return np.array(image.convert(mode))  # Copy: torch warns of memory that is not writable.


def _cut(pixels_HWC: Pixels, box: Box) -> Pixels:
    return pixels_HWC[box.top : box.top + box.height, box.left : box.left + box.width]


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels are more than {MAX_PIXELS:,}")
