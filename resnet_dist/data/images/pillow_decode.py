"""Decode with Pillow what is no ordinary JPEG: other formats, CMYK, files with something behind their end.

The format is the one that the first bytes show, and Pillow tries no other. Of several frames the first is used, as
torchvision's ImageFolder does. Transparent pixels become white. Of samples of 16 bits the upper 8 are kept; signed
ones, those of 32 bits and floats are refused, because no value of them is known to be white.

Shapes: pixels are uint8, H height, W width, C channels.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import formats
from .formats import (
    AVIF,
    BMP,
    GIF,
    HEIF,
    JPEG,
    JPEG2000,
    JXL,
    PNG,
    PPM,
    TIFF,
    WEBP,
    Format,
)
from .jpeg.header import parse_header
from .metadata import (
    ORIENTATION,
    exif_orientation,
    orient,
    orientation_of,
    without_metadata,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

    Opener = Callable[[io.BytesIO, str], ImageFile]

LARGE_PIXELS = 8_000_000  # Decode images from this size on one at a time: many threads would need gigabytes.
STRIP_PIXELS = 1_000_000  # the pixels of such an image that are converted at a time
# The lock is reentrant: a thread that falls back to Pillow may hold it already.
one_large_image = threading.RLock()

_MODULES = {
    JPEG: "PIL.JpegImagePlugin",
    PNG: "PIL.PngImagePlugin",
    WEBP: "PIL.WebPImagePlugin",
    BMP: "PIL.BmpImagePlugin",
    GIF: "PIL.GifImagePlugin",
    TIFF: "PIL.TiffImagePlugin",
    PPM: "PIL.PpmImagePlugin",
    AVIF: "PIL.AvifImagePlugin",
    JPEG2000: "PIL.Jpeg2KImagePlugin",
    HEIF: "pillow_heif",
    JXL: "pillow_jxl",
}
_CODECS = {WEBP: "webp", AVIF: "avif", JPEG2000: "jpg_2000"}  # Pillow may have been built without them
# Readers that parse an EXIF block where they open a file, although pixels do not depend on it.
_OPENED_WITHOUT_METADATA = (JPEG, AVIF, HEIF)
_QUIETLY_OPENED = (TIFF, GIF)  # Pillow warns of damaged tags, and of frames whose size is checked here.
_opening_quietly = threading.Lock()
MIN_TILE_BYTES = 14  # the two markers of a tile in a JPEG 2000
_BITS_PER_SAMPLE, _TILE_WIDTH, _TILE_HEIGHT = 258, 322, 323  # tags of TIFF


class Refused(ValueError):
    """An image that is refused by a rule of ours, so that trying again without metadata is in vain."""


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise Refused where an image has more than `max_pixels`: a small file can claim to be of any size."""
    if height * width > max_pixels:
        raise Refused(f"{too_many(height, width, max_pixels)}; raise max_pixels to allow them")


def too_many(height: int, width: int, max_pixels: int) -> str:
    return f"{height} x {width} pixels are more than {max_pixels:,}"


def decode_with_pillow(data: bytes, channels: int, max_pixels: int, *, scale: int = 1) -> NDArray[np.uint8]:
    """Decode a whole image to (H, W, C), turned as a viewer shows it.

    scale: 1, 2, 4 or 8, the reduction at which a JPEG is decoded.
    Raises ValueError where the bytes are no image that can be read, or one of more than `max_pixels`.
    """
    form = formats.format_of(data)
    if form is None:
        raise Refused(f"not a readable image: {formats.describe(data)}")
    opener = _opener(form)
    if opener is None:
        needed = form.plugin or "a Pillow that is built with its codec (11.3 or newer for AVIF)"
        raise Refused(f"not a readable image: {_named(form)}, which needs {needed}")
    first = without_metadata(data, form) if form in _OPENED_WITHOUT_METADATA else data
    try:
        pixels, orientation = _decode(first, form, opener, channels, max_pixels, scale)
    except Refused:
        raise
    except Exception as error:  # Pillow's plug-ins raise any exception that their format's parser raises.
        problem = ValueError(_describe_problem(error, form, max_pixels))
        # Try the pixels alone: metadata may be all that is damaged.
        pixels_alone = without_metadata(data, form)
        if pixels_alone in (first, data):
            raise problem from error
        try:
            pixels, orientation = _decode(pixels_alone, form, opener, channels, max_pixels, scale)
        except Exception:
            raise problem from error
    if form is JPEG:
        header, _ = parse_header(data)
        orientation = 1 if header is None else header.orientation
    return pixels if orientation == 1 else np.ascontiguousarray(orient(pixels, orientation))


def _decode(
    data: bytes, form: Format, opener: Opener, channels: int, max_pixels: int, scale: int
) -> tuple[NDArray[np.uint8], int]:
    """Return the pixels as they are stored, and the orientation, 1 to 8, in which they are shown."""
    _raise_limit_of_pillow(max_pixels)
    if form is JXL and (size := formats.jxl_size(data)):
        check_size(*size, max_pixels)
    if form is JPEG2000 and formats.jpeg2000_tiles(data) * MIN_TILE_BYTES > len(data):
        raise Refused(
            f"not a readable image: damaged {form.name} (it cannot hold as many tiles as its header names)"
        )
    with _quiet() if form in _QUIETLY_OPENED else nullcontext():
        image = opener(io.BytesIO(data), "")
        if form is TIFF:
            _prepare_tiff(image, max_pixels)
    with image:
        if scale > 1:
            image.draft("", (image.width // scale, image.height // scale))
        check_size(image.height, image.width, max_pixels)
        with one_large_image if image.height * image.width >= LARGE_PIXELS else nullcontext():
            image.load()
            pixels = _eight_bits(image, form, data, channels)
        return pixels.reshape(*pixels.shape[:2], channels), _orientation(image, form)


def _named(form: Format) -> str:
    return f"{'an' if form is AVIF else 'a'} {form.name} image"


def _describe_problem(error: Exception, form: Format, max_pixels: int) -> str:
    from PIL.Image import DecompressionBombError

    # Some readers check the size for themselves, against twice Pillow's limit.
    if isinstance(error, DecompressionBombError):
        return f"{_named(form)} has more than {max_pixels:,} pixels; raise max_pixels to allow them"
    return f"not a readable image: damaged {form.name} ({type(error).__name__}: {error})"


@cache
def _opener(form: Format) -> Opener | None:
    """Return the class that opens a format; None where this installation has none.

    It is called instead of `Image.open`, which warns of large images before their size can be checked here.
    """
    from PIL import Image, features

    try:
        module = import_module(_MODULES[form])
    except ImportError:
        return None
    if form is HEIF:
        module.register_heif_opener()
    if form in _CODECS and not features.check(_CODECS[form]):
        return None
    opener: Opener = Image.OPEN[form.name][0]
    return opener


def _raise_limit_of_pillow(max_pixels: int) -> None:
    """Keep Pillow from refusing, or warning of, what `max_pixels` allows: some of its readers check for themselves."""
    from PIL import Image

    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels


@contextmanager
def _quiet() -> Iterator[None]:
    """Ignore what Pillow warns of inside. The filters belong to all threads, so one enters at a time."""
    with _opening_quietly, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _prepare_tiff(image: Any, max_pixels: int) -> None:
    """Refuse a TIFF whose tiles take more memory than the image, and have Pillow read none of its metadata."""
    from PIL import Image

    tags, exif = image.tag_v2, Image.Exif()
    tile = tags.get(_TILE_WIDTH, 1), tags.get(_TILE_HEIGHT, 1)
    if not all(isinstance(edge, int) for edge in tile) or tile[0] * tile[1] > max_pixels:
        raise Refused(f"not a readable image: tiles of {tile[1]} x {tile[0]} pixels in a TIFF")
    if tags.get(ORIENTATION) in range(2, 9):
        exif[ORIENTATION] = tags[ORIENTATION]
    # Pillow reads all blocks of EXIF when it has decoded the pixels, and then turns them as this one says.
    image.getexif = lambda: exif


def _orientation(image: ImageFile, form: Format) -> int:
    """Return how the pixels of a loaded image are shown: by the format's own structure if it has one, else by EXIF."""
    if form in (TIFF, HEIF) or (form is JXL and not getattr(image, "jpeg", False)):
        return 1  # The pixels have been turned.
    if form is AVIF:  # Pillow stores the structure's orientation as EXIF's.
        return exif_orientation(image.info.get("exif", b"")) or 1
    return orientation_of(image.info)


def _eight_bits(image: Image, form: Format, data: bytes, channels: int) -> NDArray[np.uint8]:
    """Return the pixels of an image that is loaded, (H, W) or (H, W, 3)."""
    convert = _converter(image, form, data, "L" if channels == 1 else "RGB")
    if image.height * image.width < LARGE_PIXELS:
        return convert(image)
    # Convert a large image in strips: each conversion is a copy, and some modes take three of them.
    out = np.empty((image.height, image.width, 3)[: 2 + (channels > 1)], np.uint8)
    num_rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, num_rows):
        bottom = min(top + num_rows, image.height)
        out[top:bottom] = convert(image.crop((0, top, image.width, bottom)))
    return out


def _converter(image: Image, form: Format, data: bytes, mode: str) -> Callable[[Image], NDArray[np.uint8]]:
    """Return what converts the image, or a part of it, to 8 bits. Raises Refused where no value is known as white.

    mode: L or RGB, Pillow's name of the result.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        bits = _bits_of(image, form)
        return lambda part: np.array(_upper_bits(part, bits).convert(mode))
    if image.mode == "LAB":  # Pillow converts it to color alone.
        return lambda part: np.array(part.convert("RGB").convert(mode))
    if image.has_transparency_data and not _is_opaque(image, form, data):
        return lambda part: np.array(_on_white(part).convert(mode))
    # Copy: torch warns of memory that is not writable.
    return lambda part: np.array(part.convert(mode))


def _bits_of(image: Image, form: Format) -> int:
    """Return the bits of a sample of more than 8."""
    if form is TIFF:
        bits: int = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0]  # type: ignore[attr-defined]
        if image.mode.startswith("I;16"):
            return bits
        raise Refused(
            f"not a readable image: a TIFF of {bits}-bit {'floats' if image.mode == 'F' else 'integers'} (Pillow's "
            f"mode {image.mode}), of which no value is known to be white; save it with 8 or 16 bits without sign"
        )
    if image.mode == "F":
        raise Refused(
            f"not a readable image: {_named(form)} of floats, of which no value is known to be white"
        )
    return 16


def _upper_bits(image: Image, bits: int) -> Image:
    """Return the upper 8 of `bits` bits as gray: Pillow's own conversion would clip at 255."""
    from PIL import Image as Pillow

    gray = np.asarray(image).astype(np.int64).clip(0, 2**bits - 1) >> (bits - 8)
    return Pillow.fromarray(gray.astype(np.uint8))


def _on_white(image: Image) -> Image:
    """Show white where an image is transparent, not the arbitrary color stored there."""
    from PIL import Image as Pillow

    if image.mode in ("La", "RGBa"):  # colors multiplied by alpha
        image = image.convert(image.mode[:-1] + "A")
    rgba = image.convert("RGBA")
    return Pillow.alpha_composite(Pillow.new("RGBA", rgba.size, "white"), rgba)


def _is_opaque(image: Image, form: Format, data: bytes) -> bool:
    """Report whether the fourth channel of a BMP or TIFF is no transparency.

    Many programs write 0 there for every pixel; viewers show such a file as opaque.
    """
    if form not in (BMP, TIFF) or not image.mode.endswith("A"):
        return False
    # A BMP's header has a mask for alpha from its third version on.
    if form is BMP and (int.from_bytes(data[14:18], "little") < 56 or not any(data[66:70])):
        return True
    return image.getchannel("A").getextrema() == (0, 0)
