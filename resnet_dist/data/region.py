"""A part of a JPEG without the work for the rest of it: nvImageCodec drives libjpeg-turbo's partial decoding.

The pixels are those of a whole decode, bit for bit: where the library is missing, images are decoded whole
and the batches are the same.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        import nvidia.nvimgcodec as codec

        with _ExtensionFolder(Path(codec.__file__).parent / "extensions"):
            decoder = codec.Decoder(
                device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
                backends=[codec.Backend(codec.CPU_ONLY)],
                max_num_cpu_threads=1,  # this thread: the loader has as many as it wants
            )
        return codec, decoder.decode, codec.DecodeParams(apply_exif_orientation=False)
    except (ImportError, OSError, AttributeError, RuntimeError):  # not installed, or not for this machine
        return None


class _ExtensionFolder:
    """Shows nvImageCodec no other plug-in than libjpeg-turbo's while it starts.

    It loads all that it finds, and complains on standard error of every CUDA library that is not there.
    """

    VARIABLE = "NVIMGCODEC_EXTENSIONS_PATH"

    def __init__(self, extensions: Path) -> None:
        self._extensions = extensions

    def __enter__(self) -> None:
        self._before = os.environ.get(self.VARIABLE)
        self._folder = tempfile.TemporaryDirectory(prefix="nvimgcodec-")
        for plugin in self._extensions.glob("*jpeg_turbo*"):
            (Path(self._folder.name) / plugin.name).symlink_to(plugin)
        os.environ[self.VARIABLE] = self._folder.name

    def __exit__(self, *details: object) -> None:
        if self._before is None:
            del os.environ[self.VARIABLE]
        else:
            os.environ[self.VARIABLE] = self._before
        self._folder.cleanup()
