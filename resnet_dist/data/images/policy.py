"""Augmentation policies on one image: torchvision's operations, with our own draws.

torchvision's transforms draw from one global generator, so their result would depend on the order in which threads
run. Here the operation, its strength and its sign come from the sample's identity.

Shapes: S image size, C channels, K operations, four draws for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.data.images.decode import Pixels

BINS = 31  # levels of strength, 0 to 30, as in the papers


@dataclass(frozen=True)
class _Op:
    """An operation, and its strength at level 0 and at level 30; a `signed` one may be negated."""

    name: str
    low: float = 0.0
    high: float = 0.0
    signed: bool = False


def _space(
    *, shear: float, translate: float, rotate: float, change: float, posterize: float
) -> tuple[_Op, ...]:
    """Return the operations of both papers, which differ only in the largest strengths."""
    moves = {"shear_x": shear, "shear_y": shear, "translate_x": translate, "translate_y": translate}
    changes = dict.fromkeys(("brightness", "color", "contrast", "sharpness"), change)
    return (
        _Op("identity"),
        *(_Op(name, 0, high, signed=True) for name, high in (moves | {"rotate": rotate} | changes).items()),
        _Op("posterize", 8, posterize),
        _Op("solarize", 255, 0),
        _Op("autocontrast"),
        _Op("equalize"),
    )


# Strengths are those of torchvision's RandAugment and TrivialAugmentWide; translations are shares of the image.
RAND_AUGMENT = _space(shear=0.3, translate=150 / 331, rotate=30, change=0.9, posterize=4)
TRIVIAL_AUGMENT = _space(shear=0.99, translate=32 / 224, rotate=135, change=0.99, posterize=2)


def rand_augment(pixels_SSC: Pixels, draws_K4: NDArray[np.float64], *, magnitude: int) -> Pixels:
    """Apply K operations, all of one strength (arXiv 1909.13719). magnitude: 0 to 30."""
    for op_draw, sign_draw, *_ in draws_K4.tolist():
        op = RAND_AUGMENT[int(op_draw * len(RAND_AUGMENT))]
        pixels_SSC = apply(op, pixels_SSC, level=magnitude, negative=sign_draw < 0.5)
    return pixels_SSC


def trivial_augment(pixels_SSC: Pixels, draws_4: NDArray[np.float64]) -> Pixels:
    """Apply one operation of any strength (arXiv 2103.10158)."""
    op_draw, sign_draw, level_draw, _ = draws_4.tolist()
    op = TRIVIAL_AUGMENT[int(op_draw * len(TRIVIAL_AUGMENT))]
    return apply(op, pixels_SSC, level=int(level_draw * BINS), negative=sign_draw < 0.5)


def apply(op: _Op, pixels_SSC: Pixels, *, level: int, negative: bool) -> Pixels:
    """Apply an operation at `level`, 0 to 30; `negative` negates the strength of a signed one."""
    strength = op.low + (op.high - op.low) * level / (BINS - 1)
    if op.signed and negative:
        strength = -strength
    return _on_tensor(pixels_SSC, lambda image_CSS: _OPERATIONS[op.name](image_CSS, strength))


def jitter_color(pixels_SSC: Pixels, draws_4: NDArray[np.float64], *, strength: float) -> Pixels:
    """Change brightness, contrast and saturation by factors from 1 - strength to 1 + strength, in a random order."""
    from torchvision.transforms.v2 import functional as F

    change = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    factors = (1 + strength * (2 * draws_4[:3] - 1)).tolist()
    order = _PERMUTATIONS[int(draws_4[3] * len(_PERMUTATIONS))]

    def all_three(image_CSS: Tensor) -> Tensor:
        for number in order:
            if number != 2 or image_CSS.shape[0] == 3:  # A gray image has no saturation.
                image_CSS = change[number](image_CSS, factors[number])
        return image_CSS

    return _on_tensor(pixels_SSC, all_three)


_PERMUTATIONS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


def _on_tensor(pixels_SSC: Pixels, change: Callable[[Tensor], Tensor]) -> Pixels:
    image_CSS = torch.from_numpy(np.ascontiguousarray(pixels_SSC.transpose(2, 0, 1)))
    changed: Pixels = change(image_CSS).permute(1, 2, 0).numpy()
    return changed


def _affine(image_CSS: Tensor, **changes: Any) -> Tensor:
    from torchvision.transforms.v2 import functional as F

    neutral: dict[str, Any] = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    out: Tensor = F.affine(image_CSS, **(neutral | changes))
    return out


def _shear(tangent: float, axis: int, image_CSS: Tensor) -> Tensor:
    degrees = [0.0, 0.0]
    degrees[axis] = float(np.degrees(np.arctan(tangent)))
    # Shear about the corner, as Pillow does: the papers used Pillow.
    return _affine(image_CSS, shear=degrees, center=[0, 0])


def _translate(share: float, axis: int, image_CSS: Tensor) -> Tensor:
    pixels = [0, 0]
    pixels[axis] = int(share * image_CSS.shape[-1])
    return _affine(image_CSS, translate=pixels)


def _functional(name: str, image_CSS: Tensor, *arguments: Any) -> Tensor:
    from torchvision.transforms.v2 import functional as F

    out: Tensor = getattr(F, name)(image_CSS, *arguments)
    return out


_OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda image, strength: image,
    "shear_x": lambda image, strength: _shear(strength, 0, image),
    "shear_y": lambda image, strength: _shear(strength, 1, image),
    "translate_x": lambda image, strength: _translate(strength, 0, image),
    "translate_y": lambda image, strength: _translate(strength, 1, image),
    "rotate": lambda image, strength: _functional("rotate", image, strength),
    "brightness": lambda image, strength: _functional("adjust_brightness", image, 1 + strength),
    "color": lambda image, strength: (
        _functional("adjust_saturation", image, 1 + strength) if image.shape[0] == 3 else image
    ),
    "contrast": lambda image, strength: _functional("adjust_contrast", image, 1 + strength),
    "sharpness": lambda image, strength: _functional("adjust_sharpness", image, 1 + strength),
    "posterize": lambda image, strength: _functional("posterize", image, round(strength)),
    "solarize": lambda image, strength: _functional("solarize", image, strength),
    "autocontrast": lambda image, strength: _functional("autocontrast", image),
    "equalize": lambda image, strength: _functional("equalize", image),
}
