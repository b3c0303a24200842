"""Changes by cameras and programs: contrast, pixelation, JPEG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnet_dist.data.images.corruptions.chance import Chance

Floats = NDArray[Any]  # float32


def contrast(image: Floats, strength: tuple[float], chance: Chance) -> Floats:
    """Move every value towards the mean of its channel. strength: the share of the distance that is left."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    found: Floats = ((image - mean) * strength[0] + mean).astype(np.float32)
    return found


def pixelate(image: Floats, strength: tuple[float], chance: Chance) -> Floats:
    """Lower the resolution. strength: the share of the side that is left."""
    size = image.shape[0]
    small = max(1, int(size * strength[0]))
    picture = _picture(image).resize((small, small), Image.Resampling.BOX)
    return _floats(picture.resize((size, size), Image.Resampling.BOX), image.shape)


def jpeg_compression(image: Floats, strength: tuple[float], chance: Chance) -> Floats:
    """Compress as JPEG. strength: the quality, as libjpeg counts it."""
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=int(strength[0]))
    with Image.open(file) as opened:
        return _floats(opened, image.shape)


def _picture(image: Floats) -> Image.Image:
    pixels = np.rint(image * 255).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _floats(picture: Image.Image, shape: tuple[int, ...]) -> Floats:
    found: Floats = (np.asarray(picture, np.float32) / 255).reshape(shape)
    return found
