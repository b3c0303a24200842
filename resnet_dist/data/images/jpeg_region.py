"""A part of a JPEG without the work for the rest of it: nvImageCodec drives libjpeg-turbo's partial decoding.

The pixels are those of a whole decode, bit for bit: where the library is missing, images are decoded whole
and the batches are the same. Except for a file that is damaged in its middle: the rest of it is never looked at,
so a crop may be good where a whole decode refuses the sample. To look would cost what this saves; `prepare` leaves
out, and `index --verify` names, what a whole decode refuses.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PLUGINS = "NVIMGCODEC_EXTENSIONS_PATH"
KEEP_BYTES = 32 * 2**20  # of memory that a thread uses again: fresh memory costs a page fault every 4 KiB

_thread = threading.local()
_start = threading.Lock()


def decode_region(data: bytes, top: int, left: int, height: int, width: int) -> NDArray[np.uint8] | None:
    """(height, width, 3) RGB of a part of a JPEG; None where it cannot be had this way.

    Good until this thread asks for the next one. EXIF's orientation is left alone.
    """
    decoder = _decoder_of_thread()
    if decoder is None:
        return None
    codec, decode, params = decoder
    try:
        region = codec.Region(top, left, top + height, left + width)
        stream = codec.CodeStream(data).get_sub_code_stream(region=region)
        image = decode(stream, image=_thread.image, params=params)
    except RuntimeError:  # a header that it does not understand
        return None
    if image is None:
        _thread.image = None
        return None
    _thread.image = image if height * width * 3 <= KEEP_BYTES else None
    pixels: NDArray[np.uint8] = np.asarray(image)
    return pixels if pixels.shape == (height, width, 3) else None


def _decoder_of_thread() -> tuple[Any, Any, Any] | None:
    """(module, decode, parameters), made once in each thread; None where nvImageCodec is not installed."""
    try:
        decoder: tuple[Any, Any, Any] | None = _thread.decoder
    except AttributeError:
        with _start:
            decoder = _thread.decoder = _make_decoder()
        _thread.image = None
    return decoder


def _make_decoder() -> tuple[Any, Any, Any] | None:
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # a bad sample is the loader's to report
    try:
        with _only_libjpeg_turbo():
            import nvidia.nvimgcodec as codec

            decoder = codec.Decoder(
                device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
                backends=[codec.Backend(codec.CPU_ONLY)],
                max_num_cpu_threads=1,  # this thread: the loader has as many as it wants
            )
        return codec, decoder.decode, codec.DecodeParams(apply_exif_orientation=False)
    except (ImportError, OSError, AttributeError, RuntimeError):  # not installed, or not for this machine
        return None


@contextmanager
def _only_libjpeg_turbo() -> Iterator[None]:
    """Inside, nvImageCodec finds no other plug-in than that for libjpeg-turbo. Raises ImportError without it.

    When it is imported it loads all that it finds, and complains on standard error of every CUDA library that
    is not there.
    """
    package = find_spec("nvidia.nvimgcodec")
    if package is None or package.origin is None:
        raise ImportError("nvImageCodec is not installed")
    before = os.environ.get(PLUGINS)
    with tempfile.TemporaryDirectory(prefix="nvimgcodec-") as folder:
        for plugin in (Path(package.origin).parent / "extensions").glob("*jpeg_turbo*"):
            (Path(folder) / plugin.name).symlink_to(plugin)
        os.environ[PLUGINS] = folder
        try:
            yield
        finally:
            del os.environ[PLUGINS]
            if before is not None:
                os.environ[PLUGINS] = before
