"""Decodes a part of a JPEG without the work for the rest: nvImageCodec drives libjpeg-turbo's partial decoding.

The pixels equal those of a whole decode, bit for bit. Where the library is missing, images are decoded whole and
the batches are the same. The one exception is a file that is damaged in its middle: the rest of it is not read, so a
crop may be good where a whole decode would fail. Reading it would cost what this module saves; `prepare` leaves
such files out, and `index --verify` lists them.
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
# Plug-ins of nvImageCodec by the start of their files' names: for libjpeg-turbo, and for nvJPEG, which needs CUDA.
ON_CPU, ON_GPU = "libjpeg_turbo", "libnvjpeg_ext"
MAX_REUSED_BYTES = 32 * 2**20  # A thread keeps this much between images: fresh memory costs page faults.

_thread = threading.local()
_start = threading.Lock()


def region_stream(data: bytes, top: int, left: int, height: int, width: int) -> Any | None:
    """Return a part of a JPEG for `decode_region`; None where nvImageCodec is missing or fails.

    Positions are in pixels as stored: EXIF's orientation is not applied.
    """
    decoder = _decoder_of_thread()
    if decoder is None:
        return None
    codec, _, _ = decoder
    try:
        region = codec.Region(top, left, top + height, left + width)
        return codec.CodeStream(data).get_sub_code_stream(region=region)
    except RuntimeError:  # nvImageCodec does not understand the header.
        return None


def decode_region(stream: Any, height: int, width: int) -> NDArray[np.uint8] | None:
    """Return a part of a JPEG as (height, width, 3) RGB; None where nvImageCodec fails.

    stream: the part, as `region_stream` has returned it in this thread. The pixels are valid until this thread asks for
    the next part.
    """
    _, decode, params = _thread.decoder
    try:
        image = decode(stream, image=_thread.image, params=params)
    except RuntimeError:
        return None
    if image is None:
        _thread.image = None
        return None
    _thread.image = image if height * width * 3 <= MAX_REUSED_BYTES else None
    pixels: NDArray[np.uint8] = np.asarray(image)
    return pixels if pixels.shape == (height, width, 3) else None


def _decoder_of_thread() -> tuple[Any, Any, Any] | None:
    """Return (module, decode, parameters), made once in each thread; None where nvImageCodec cannot be used."""
    try:
        decoder: tuple[Any, Any, Any] | None = _thread.decoder
    except AttributeError:
        with _start:
            decoder = _thread.decoder = _make_decoder()
        _thread.image = None
    return decoder


def _make_decoder() -> tuple[Any, Any, Any] | None:
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # The loader reports bad samples itself.
    try:
        codec = import_codec(ON_CPU)
        decoder = codec.Decoder(
            device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
            backends=[codec.Backend(codec.CPU_ONLY)],
            max_num_cpu_threads=1,  # The loader has decoding threads of its own.
        )
        return codec, decoder.decode, codec.DecodeParams(apply_exif_orientation=False)
    except (ImportError, OSError, AttributeError, RuntimeError):
        # The library is not installed, or not built for this machine.
        return None


def import_codec(*plugins: str) -> Any:
    """Import nvImageCodec with these plug-ins; the first import in a process decides. Raises ImportError without it."""
    with _only(plugins):
        import nvidia.nvimgcodec as codec

        return codec


@contextmanager
def _only(plugins: tuple[str, ...]) -> Iterator[None]:
    """Hide all other plug-ins of nvImageCodec. Raises ImportError where the package is missing.

    On import, nvImageCodec loads every plug-in that it finds, and reports every missing CUDA library on standard
    error.
    """
    package = find_spec("nvidia.nvimgcodec")
    if package is None or package.origin is None:
        raise ImportError("nvImageCodec is not installed")
    before = os.environ.get(PLUGINS)
    with tempfile.TemporaryDirectory(prefix="nvimgcodec-") as folder:
        for plugin in (Path(package.origin).parent / "extensions").iterdir():
            if plugin.name.startswith(plugins):
                (Path(folder) / plugin.name).symlink_to(plugin)
        os.environ[PLUGINS] = folder
        try:
            yield
        finally:
            del os.environ[PLUGINS]
            if before is not None:
                os.environ[PLUGINS] = before
