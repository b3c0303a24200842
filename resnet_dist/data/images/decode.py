"""Encoded bytes → pixels: of a whole image, or of the part that a crop needs.

The header is read first, so that the caller can choose a crop before anything is decoded. Of a JPEG, only the crop
is decoded (jpeg/); a crop of at least twice the wanted size is decoded at 1/2, 1/4 or 1/8 of the scale.

Shapes: pixels are uint8, H height, W width, C channels.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from . import formats
from .jpeg.header import JpegHeader, parse_header, parse_layout, read_header
from .jpeg.region import decode_region, region_stream
from .jpeg.seekable import Part, cut_part
from .metadata import orient
from .pillow_decode import (
    LARGE_PIXELS,
    decode_with_pillow,
    one_large_image,
    too_many,
)

Pixels = NDArray[np.uint8]

# As config.data.MAX_PIXELS, which a logged model's copy of this module cannot import; a test compares them.
MAX_PIXELS = 80_000_000
SMALL_PIXELS = 128 * 128  # Decode images up to this size whole, into fresh memory: it is the fastest way.
MAX_SCALE = 8  # the strongest reduction that JPEG's inverse transform offers
MAX_SCRATCH_BYTES = 32 * 2**20  # A thread keeps this much between images: fresh memory costs page faults.
# A block of 8 x 8 pixels takes one Huffman code of one bit at least: a JPEG of fewer bytes is cut off or a bomb.
MAX_JPEG_PIXELS_PER_BYTE = 512
END_OF_IMAGE = b"\xff\xd9"

_scratch = threading.local()


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

    @property
    def min_scale(self) -> int:
        """The least reduction at which `pixels` decodes: 1, unless the image has more than `max_pixels`."""
        ...

    @property
    def plain_jpeg(self) -> bytes | None:
        """The bytes of an ordinary JPEG in color, from which another decoder can cut a box; None for all other images."""
        ...

    @property
    def held_bytes(self) -> int:
        """The memory that the image holds: encoded, or decoded already."""
        ...

    def prepare(self, box: Box, size: int) -> None:
        """Do what `pixels` of the same arguments does before it decodes: it is faster for many images in turn."""
        ...

    def pixels(self, box: Box, size: int) -> Pixels:
        """Return `box` as (H, W, C), to be resized to `size` x `size` by the caller.

        It is already shrunk by `scale_for`, where the box lies on the grid of that scale and the format allows it.
        The pixels are valid until this thread asks for those of the next image. Raises ValueError where the bytes
        cannot be decoded, or where an image of more than `max_pixels` had to be decoded at more than 1/`min_scale`.
        """
        ...


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
        return _Jpeg(data, channels, header, max_pixels)
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


def _grid_scale(box: Box, size: int) -> int:
    """Return `scale_for` of a box where it lies on the grid of that scale, else 1."""
    scale = scale_for(box.height, box.width, size)
    return 1 if any(edge % scale for edge in box) else scale


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
        return _cut(self._pixels, box)


class _Jpeg:
    """A JPEG of which each crop is decoded when it is asked for."""

    min_scale = 1

    def __init__(self, data: bytes, channels: int, header: JpegHeader, max_pixels: int) -> None:
        self._data, self._header, self._max_pixels = data, header, max_pixels
        self._channels, self._space = channels, "GRAY" if channels == 1 else "RGB"
        turned = header.orientation >= 5  # 5 to 8 turn the image by a quarter, which exchanges the axes
        self.height = header.width if turned else header.height
        self.width = header.height if turned else header.width
        num_pixels = header.height * header.width
        if num_pixels >= LARGE_PIXELS or num_pixels > max_pixels:
            self.min_scale = _min_scale(data, header, max_pixels)
        self.held_bytes = len(data)
        # A box and its scale, and what holds it: a part of a seekable JPEG, or nvImageCodec's stream of another one.
        self._prepared: tuple[Box, int, Any] | None = None

    @property
    def plain_jpeg(self) -> bytes | None:
        header = self._header
        is_plain = (
            self._channels == header.components == 3
            and header.orientation == 1
            and header.height * header.width < LARGE_PIXELS
            and self.min_scale == 1
            # As in `_has_region`: a truncated file is bad wherever the crop lies.
            and self._data.endswith(END_OF_IMAGE)
        )
        return self._data if is_plain else None

    def prepare(self, box: Box, size: int) -> None:
        if self._header.orientation == 1 and self.min_scale == 1:
            scale = _grid_scale(box, size)
            source = self._source(box, scale)
            self._prepared = box, scale, source
            self.held_bytes = len(self._data) + (len(source.jpeg) if isinstance(source, Part) else 0)

    def _source(self, box: Box, scale: int) -> Any | None:
        """Return what `box` is decoded from; None where that is the whole file: all of it is wanted, or it is damaged."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[:2] == (box, scale):
            return prepared[2]
        header = self._header
        if header.height * header.width <= SMALL_PIXELS or box == (0, 0, header.height, header.width):
            return None
        if header.table_at:
            return cut_part(self._data, header.table_at, *box, scale=scale)
        return region_stream(self._data, *box) if scale == 1 and self._has_region() else None

    def pixels(self, box: Box, size: int) -> Pixels:
        if self._header.height * self._header.width < LARGE_PIXELS and self.min_scale == 1:
            return self._pixels(box, size)
        with one_large_image:
            return self._pixels(box, size) if self.min_scale == 1 else self._reduced(box, size)

    def _pixels(self, box: Box, size: int) -> Pixels:
        orientation = self._header.orientation
        try:
            if orientation == 1:
                return self._decode_part(box, _grid_scale(box, size))
            return _cut(orient(self._decode(), orientation), box)
        except ValueError:
            # Let Pillow try: it decodes CMYK, and tolerates some errors.
            return _cut(decode_with_pillow(self._data, self._channels, self._max_pixels), box)

    def _reduced(self, box: Box, size: int) -> Pixels:
        """Return `box` of an image that has more than `max_pixels`, decoded at the scale for `size`."""
        header, scale = self._header, scale_for(box.height, box.width, size)
        if scale < self.min_scale:
            raise ValueError(
                f"{too_many(header.height, header.width, self._max_pixels)}, and {size} pixels of {box.height} x "
                f"{box.width} need 1/{scale} of its scale; raise max_pixels to allow them"
            )
        try:
            pixels = orient(self._decode_at(scale), header.orientation)
        except ValueError:  # as in `_pixels`
            pixels = decode_with_pillow(self._data, self._channels, self._max_pixels, scale=scale)
        if box == (0, 0, self.height, self.width):
            return pixels  # The last row and column may stand for fewer than `scale`.
        return _cut(pixels, Box(*(edge // scale for edge in box)))

    def _decode_part(self, box: Box, scale: int) -> Pixels:
        """Return `box` of an image without rotation, at 1/`scale`."""
        source = self._source(box, scale)
        pixels: Pixels | None = None
        if isinstance(source, Part):
            pixels = self._decode_cut(source, box, scale)
        elif source is not None:
            pixels = decode_region(source, box.height, box.width)
        if pixels is not None:
            return pixels
        if scale > 1:
            return _cut(self._decode_at(scale), Box(*(edge // scale for edge in box)))
        return _cut(self._decode(), box)

    def _decode_cut(self, part: Part, box: Box, scale: int) -> Pixels | None:
        """Return `box` of the part that holds it, at 1/`scale`; None where the part cannot be decoded."""
        try:
            pixels = _decode_jpeg(part.jpeg, part.height, part.width, self._space, scale)
        except ValueError:
            return None
        return _cut(pixels, Box(*(edge // scale for edge in (part.top, part.left, box.height, box.width))))

    def _has_region(self) -> bool:
        """Report whether `decode_region` decodes a part faster than all of the file."""
        return (
            self._channels == self._header.components == 3
            # Decode a truncated file whole, which fails: it is bad wherever the crop lies.
            and self._data.endswith(END_OF_IMAGE)
        )

    def _decode(self) -> Pixels:
        """Decode all of the image, as it is stored."""
        pixels = self._header.height * self._header.width
        buffer = _thread_buffer(pixels * self._channels) if pixels > SMALL_PIXELS else None
        decoded: Pixels = simplejpeg.decode_jpeg(self._data, self._space, buffer=buffer)
        return decoded

    def _decode_at(self, scale: int) -> Pixels:
        """Decode all of the image, as it is stored, at 1/`scale`: (ceil(H / scale), ceil(W / scale), C)."""
        return _decode_jpeg(self._data, self._header.height, self._header.width, self._space, scale)


def _decode_jpeg(data: bytes | bytearray, height: int, width: int, space: str, scale: int) -> Pixels:
    """Decode a JPEG of this size at 1/`scale`, (ceil(H / scale), ceil(W / scale), C), into this thread's buffer."""
    height, width = shape = -(-height // scale), -(-width // scale)
    decoded: Pixels = simplejpeg.decode_jpeg(
        data,
        space,
        min_height=height,
        min_width=width,
        min_factor=scale,
        buffer=_thread_buffer(height * width * (1 if space == "GRAY" else 3)),
    )
    if decoded.shape[:2] != shape:
        raise ValueError("decoded at another scale than asked for")
    return decoded


def _min_scale(data: bytes, header: JpegHeader, max_pixels: int) -> int:
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


def _cut(pixels_HWC: Pixels, box: Box) -> Pixels:
    return pixels_HWC[box.top : box.top + box.height, box.left : box.left + box.width]
