"""The operations of the policies: torchvision's functions, on a tensor or on an image of Pillow.

The sources of the recipes used Pillow. On tensors most operations take less time and give nearly the same pixels.

Shapes: S image size, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resnet_dist.data.images.opened import Pixels

Interpolation = Literal["nearest", "bilinear", "bicubic"]
SOLARIZE_ADD_THRESHOLD = 128  # Darker pixels become lighter.


@dataclass(frozen=True)
class Canvas:
    """The library that changes an image, and the rules for pixels that are moved."""

    pillow: bool = False
    interpolation: Interpolation = "nearest"
    fill: tuple[int, ...] | None = None  # color outside the image, per channel; None: black

    def change(self, pixels_SSC: Pixels, operation: Callable[[Any], Any]) -> Pixels:
        """Return the pixels after `operation`, which gets and returns a tensor (C, S, S) or an image of Pillow."""
        return (_on_pillow if self.pillow else on_tensor)(pixels_SSC, operation)

    def moves(self) -> dict[str, Any]:
        """Return the keyword arguments of torchvision's functions that move pixels."""
        from torchvision.transforms.v2 import InterpolationMode

        fill = None if self.fill is None else list(self.fill)
        return {"interpolation": InterpolationMode(self.interpolation), "fill": fill}


def on_tensor(pixels_SSC: Pixels, operation: Callable[[Tensor], Tensor]) -> Pixels:
    image_CSS = torch.from_numpy(np.ascontiguousarray(pixels_SSC.transpose(2, 0, 1)))
    changed: Pixels = operation(image_CSS).permute(1, 2, 0).numpy()
    return changed


def _on_pillow(pixels_SSC: Pixels, operation: Callable[[Image.Image], Image.Image]) -> Pixels:
    gray = pixels_SSC.shape[2] == 1
    changed = np.asarray(operation(Image.fromarray(pixels_SSC[:, :, 0] if gray else pixels_SSC)))
    return changed[:, :, None] if gray else changed


def operate(name: str, image: Any, strength: float, canvas: Canvas) -> Any:
    """Return the image after the operation called `name`: a tensor (C, S, S), or an image of Pillow."""
    if name == "identity" or (name == "color" and _channels(image) == 1):  # A gray image has no color.
        return image
    if name in _MOVES:
        return _MOVES[name](image, strength, canvas)
    if name == "solarize_add":
        return _solarize_add(image, int(strength))
    if name == "posterize" and round(strength) == 0:  # Pillow refuses to keep no bit.
        return image.point([0] * 256 * _channels(image))
    function, argument = _CHANGES[name]
    return _functional(function, image, *([] if argument is None else [argument(strength)]))


def _channels(image: Any) -> int:
    return image.shape[0] if isinstance(image, Tensor) else len(image.getbands())


def _size(image: Any) -> int:
    size: int = image.shape[-1] if isinstance(image, Tensor) else image.width
    return size


def _functional(name: str, image: Any, *arguments: Any, **options: Any) -> Any:
    """Call a function of torchvision, imported late: a recipe without a policy does not wait for it."""
    from torchvision.transforms.v2 import functional as F

    return getattr(F, name)(image, *arguments, **options)


def _affine(image: Any, canvas: Canvas, **changes: Any) -> Any:
    neutral: dict[str, Any] = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return _functional("affine", image, **(neutral | changes), **canvas.moves())


def _shear(axis: int) -> Callable[[Any, float, Canvas], Any]:
    def shear(image: Any, tangent: float, canvas: Canvas) -> Any:
        degrees = [0.0, 0.0]
        degrees[axis] = float(np.degrees(np.arctan(tangent)))
        # Shear about the corner, as Pillow does: the papers used Pillow.
        return _affine(image, canvas, shear=degrees, center=[0, 0])

    return shear


def _translate(axis: int, pixels_of: Callable[[float, int], float]) -> Callable[[Any, float, Canvas], Any]:
    """Return an operation that moves an image by `pixels_of(strength, image size)`."""

    def translate(image: Any, strength: float, canvas: Canvas) -> Any:
        pixels: list[float] = [0, 0]
        pixels[axis] = pixels_of(strength, _size(image))
        return _affine(image, canvas, translate=pixels)

    return translate


def _rotate(image: Any, degrees: float, canvas: Canvas) -> Any:
    return _functional("rotate", image, degrees, **canvas.moves())


def _solarize_add(image: Image.Image, added: int) -> Image.Image:
    table = [min(255, value + added) if value < SOLARIZE_ADD_THRESHOLD else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _whole_share(share: float, size: int) -> int:
    return int(share * size)


# translate_: a share of the image, in whole pixels; translate_pixels_: whole pixels; translate_part_: a share, exactly.
_MOVES: dict[str, Callable[[Any, float, Canvas], Any]] = {
    "shear_x": _shear(0),
    "shear_y": _shear(1),
    "translate_x": _translate(0, _whole_share),
    "translate_y": _translate(1, _whole_share),
    "translate_pixels_x": _translate(0, lambda pixels, _: int(pixels)),
    "translate_pixels_y": _translate(1, lambda pixels, _: int(pixels)),
    "translate_part_x": _translate(0, lambda share, size: share * size),
    "translate_part_y": _translate(1, lambda share, size: share * size),
    "rotate": _rotate,
}

# The name of torchvision's function, and its argument at a strength; None where it has none.
_CHANGES: dict[str, tuple[str, Callable[[float], float] | None]] = {
    "brightness": ("adjust_brightness", lambda strength: 1 + strength),
    "color": ("adjust_saturation", lambda strength: 1 + strength),
    "contrast": ("adjust_contrast", lambda strength: 1 + strength),
    "sharpness": ("adjust_sharpness", lambda strength: 1 + strength),
    "posterize": ("posterize", round),
    "solarize": ("solarize", lambda strength: strength),
    "autocontrast": ("autocontrast", None),
    "equalize": ("equalize", None),
    "invert": ("invert", None),
}
