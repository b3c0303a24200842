"""Decodes boxes of JPEGs on a GPU, many at once, by nvJPEG, which nvImageCodec drives.

On a CPU the same calls decode with libjpeg-turbo: so the code around them is tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.dlpack import from_dlpack

from resnet_dist.data.images.jpeg.region import ON_CPU, ON_GPU, import_codec
from resnet_dist.data.images.opened import Box
from resnet_dist.errors import UserError

# Chroma is enlarged as libjpeg-turbo does: linearly, not by repeating each value.
OPTIONS = ":fancy_upsampling=1"
INSTALL = "pip install nvidia-nvimgcodec-cu13 nvidia-nvjpeg"


class Codec(Protocol):
    """Decodes boxes of JPEGs to a device."""

    def decode(self, boxes: Sequence[tuple[bytes, Box]]) -> list[Tensor | None]:
        """Return each box as (H, W, 3) uint8 on the device, in the order of the current stream; None where it fails."""
        ...


class NvCodec:
    """The codec of one device; one thread at a time may use it. Raises UserError where the device cannot decode."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_gpu = device, device.type == "cuda"
        try:
            self._library = import_codec(ON_CPU, *([ON_GPU] if self._is_gpu else []))
            self._decoder = self._make_decoder()
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"data.decode='gpu' needs nvImageCodec with nvJPEG on {device}, which is missing or fails ({error}): "
                f"{INSTALL}, or use data.decode=cpu"
            ) from None
        self._params = self._library.DecodeParams(apply_exif_orientation=False)

    def _make_decoder(self) -> Any:
        library = self._library
        if not self._is_gpu:
            return library.Decoder(
                device_id=library.NVIMGCODEC_DEVICE_CPU_ONLY, backends=[library.Backend(library.CPU_ONLY)]
            )
        # Without the backend for CPUs: what nvJPEG cannot decode is decoded, and counted, by the loader's threads.
        kinds = (library.HW_GPU_ONLY, library.GPU_ONLY, library.HYBRID_CPU_GPU)
        backends = [library.Backend(kind) for kind in kinds]
        return library.Decoder(device_id=self._device.index or 0, backends=backends, options=OPTIONS)

    def decode(self, boxes: Sequence[tuple[bytes, Box]]) -> list[Tensor | None]:
        streams = [self._cut(encoded, box) for encoded, box in boxes]
        readable = [stream for stream in streams if stream is not None]
        if not readable:
            return [None] * len(boxes)
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._is_gpu else 0
        found = iter(self._decoder.decode(readable, params=self._params, cuda_stream=stream))
        return [
            None if cut is None else self._tensor(next(found), box)
            for cut, (_, box) in zip(streams, boxes, strict=True)
        ]

    def _cut(self, encoded: bytes, box: Box) -> Any:
        region = self._library.Region(box.top, box.left, box.top + box.height, box.left + box.width)
        try:
            return self._library.CodeStream(encoded).get_sub_code_stream(region=region)
        except RuntimeError:  # It does not understand the header.
            return None

    def _tensor(self, image: Any, box: Box) -> Tensor | None:
        if image is None or tuple(image.shape) != (box.height, box.width, 3):
            return None
        if self._is_gpu:
            return from_dlpack(image)
        return torch.from_numpy(np.asarray(image).copy())


def resize_box(pixels_HWC: Tensor, size: int, mode: str) -> Tensor:
    """Resize one image on its device, antialiased: (H, W, C) → (size, size, C) uint8. mode: bilinear or bicubic."""
    if pixels_HWC.shape[:2] == (size, size):
        return pixels_HWC
    images_NCHW = pixels_HWC.permute(2, 0, 1)[None].float()
    out = F.interpolate(images_NCHW, (size, size), mode=mode, antialias=True)
    return out[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
