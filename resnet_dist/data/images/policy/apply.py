"""The operations that one image gets, and the color jitter, by draws from the sample's identity.

torchvision's transforms draw from one global generator, so their result would depend on the order in which threads
run. Here the operation, its strength and its sign come from the sample's identity.

Shapes: S image size, C channels, K operations, four draws for each.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.config import Data
from resnet_dist.data.images.opened import Pixels
from resnet_dist.data.images.policy.operations import Canvas, Interpolation, on_tensor, operate
from resnet_dist.data.images.policy.spaces import (
    BINS,
    RAND_AUGMENT,
    TIMM_RAND_AUGMENT,
    TRIVIAL_AUGMENT,
    TRIVIAL_AUGMENT_PIXELS,
    Op,
    Space,
)

MAX_LEVEL = BINS - 1
ON_TENSORS = Canvas()
# Draws are multiples of 2**-32: it keeps them off 0, where the normal distribution has no value.
HALF_A_WORD = 2.0**-33


def rand_augment(pixels_SSC: Pixels, draws_K4: NDArray[np.float64], data: Data) -> Pixels:
    """Apply K operations, all of one strength (arXiv 1909.13719), or of strengths around it as timm does."""
    space: Space = TIMM_RAND_AUGMENT if data.policy_space == "timm" else RAND_AUGMENT
    for op_draw, coins, level_draw, apply_draw in draws_K4.tolist():
        if apply_draw < data.policy_probability:
            op = space[int(op_draw * len(space))]
            level = _noisy(data.policy_magnitude, data.policy_noise, level_draw)
            pixels_SSC = apply(op, pixels_SSC, level=level, negative=coins < 0.5, canvas=_canvas(data, coins))
    return pixels_SSC


def trivial_augment(pixels_SSC: Pixels, draws_4: NDArray[np.float64], data: Data) -> Pixels:
    """Apply one operation of any strength (arXiv 2103.10158)."""
    space: Space = TRIVIAL_AUGMENT_PIXELS if data.policy_translation == "pixels" else TRIVIAL_AUGMENT
    op_draw, coins, level_draw, _ = draws_4.tolist()
    op = space[int(op_draw * len(space))]
    level = int(level_draw * BINS)
    return apply(op, pixels_SSC, level=level, negative=coins < 0.5, canvas=_canvas(data, coins))


def apply(op: Op, pixels_SSC: Pixels, *, level: float, negative: bool, canvas: Canvas = ON_TENSORS) -> Pixels:
    """Apply an operation at `level`, 0 to 30; `negative` negates the strength of a signed one."""
    strength = op.strength(level, negative=negative)
    return canvas.change(pixels_SSC, lambda image: operate(op.name, image, strength, canvas))


def _noisy(magnitude: int, deviation: float, draw: float) -> float:
    """Return a level from a normal distribution around `magnitude`, limited to 0 .. 30."""
    if deviation == 0:
        return magnitude
    return min(MAX_LEVEL, max(0.0, NormalDist(magnitude, deviation).inv_cdf(draw + HALF_A_WORD)))


def _canvas(data: Data, coins: float) -> Canvas:
    """Return the recipe's canvas. The first bit of `coins` is the sign, the second one the interpolation."""
    interpolation: Interpolation
    if data.policy_interpolation == "random":
        interpolation = "bicubic" if int(coins * 4) % 2 else "bilinear"
    else:
        interpolation = data.policy_interpolation
    fill = data.mean if data.policy_fill == "mean" else None
    return _make_canvas(data.policy_backend == "pillow", interpolation, fill)


@lru_cache
def _make_canvas(pillow: bool, interpolation: Interpolation, mean: tuple[float, ...] | None) -> Canvas:
    fill = None if mean is None else tuple(min(255, round(255 * value)) for value in mean)
    return Canvas(pillow, interpolation, fill)


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

    return on_tensor(pixels_SSC, all_three)


_PERMUTATIONS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
