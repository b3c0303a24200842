"""A JPEG of which each crop is decoded when it is asked for: the part that holds it alone, where there is a way.

The ways, the fastest first: the part that is cut out of a seekable file, nvImageCodec's regions, the whole file at a
reduced scale, the whole file. Pillow decodes what libjpeg-turbo refuses.
"""

from __future__ import annotations

from typing import Any

import simplejpeg

from ..metadata import orient
from ..opened import Box, Pixels, cut, grid_scale, scale_for
from ..pillow_decode import LARGE_PIXELS, decode_with_pillow, one_large_image, too_many
from .header import JpegHeader
from .region import decode_region, region_stream
from .scales import decode_scaled, find_min_scale, thread_buffer
from .seekable import Part, cut_part

SMALL_PIXELS = 128 * 128  # Decode images up to this size whole, into fresh memory: it is the fastest way.
END_OF_IMAGE = b"\xff\xd9"


class JpegImage:
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
            self.min_scale = find_min_scale(data, header, max_pixels)
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
            scale = grid_scale(box, size)
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
                return self._decode_part(box, grid_scale(box, size))
            return cut(orient(self._decode(), orientation), box)
        except ValueError:
            # Let Pillow try: it decodes CMYK, and tolerates some errors.
            return cut(decode_with_pillow(self._data, self._channels, self._max_pixels), box)

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
        return cut(pixels, Box(*(edge // scale for edge in box)))

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
            return cut(self._decode_at(scale), Box(*(edge // scale for edge in box)))
        return cut(self._decode(), box)

    def _decode_cut(self, part: Part, box: Box, scale: int) -> Pixels | None:
        """Return `box` of the part that holds it, at 1/`scale`; None where the part cannot be decoded."""
        try:
            pixels = decode_scaled(part.jpeg, part.height, part.width, self._space, scale)
        except ValueError:
            return None
        return cut(pixels, Box(*(edge // scale for edge in (part.top, part.left, box.height, box.width))))

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
        buffer = thread_buffer(pixels * self._channels) if pixels > SMALL_PIXELS else None
        decoded: Pixels = simplejpeg.decode_jpeg(self._data, self._space, buffer=buffer)
        return decoded

    def _decode_at(self, scale: int) -> Pixels:
        """Decode all of the image, as it is stored, at 1/`scale`: (ceil(H / scale), ceil(W / scale), C)."""
        return decode_scaled(self._data, self._header.height, self._header.width, self._space, scale)
