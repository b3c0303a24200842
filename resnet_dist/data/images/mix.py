"""Mixup and CutMix: every image of a micro-batch is mixed with its neighbour in it.

The draws depend on (seed, step, number of the micro-batch), so that any number of ranks mixes the same images in
the same way. Labels are not mixed here: the loss mixes, which is equivalent for cross-entropy and needs no soft
targets.

Shapes: M images of a micro-batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from resnet_dist.config import Data
from resnet_dist.order.philox import Purpose, uniform, words_of

MAX_REJECTION_ALPHA = 2.0  # the largest alpha that is drawn by rejection
TRIES = 64  # Each try succeeds with a probability of 1/6 at alpha 2, and of more below.


class Mixed(NamedTuple):
    """Image i is `share` of sample i and the rest of sample `partner[i]`."""

    images_MCHW: Tensor
    share: float

    @staticmethod
    def partner(values_M: Tensor) -> Tensor:
        """Return, for each image, the value of the sample that it is mixed with."""
        return values_M.roll(1, 0)


def mix(images_MCHW: Tensor, data: Data, *, seed: int, step: int, micro_batch: int) -> Mixed:
    """Mix the images of one micro-batch; without mixing in the recipe, return them as they are with a share of 1.

    micro_batch: its number in the global batch, over all ranks.
    """
    if not (data.mixup or data.cutmix) or len(images_MCHW) < 2:
        return Mixed(images_MCHW, 1.0)
    number = np.array([micro_batch])
    words = words_of(number, Purpose.MIX, seed=seed, epoch=step & 0xFFFFFFFF, blocks=1 + TRIES // 2)
    choice, top, left, _, *tries = uniform(words)[0].tolist()
    cutmix = data.cutmix > 0 and (data.mixup == 0 or choice < 0.5)
    share = beta(data.cutmix if cutmix else data.mixup, tries)
    return _cut(images_MCHW, share, top, left) if cutmix else _blend(images_MCHW, share)


def _blend(images_MCHW: Tensor, share: float) -> Mixed:
    return Mixed(images_MCHW.lerp(Mixed.partner(images_MCHW), 1 - share), share)


def _cut(images_MCHW: Tensor, share: float, top_draw: float, left_draw: float) -> Mixed:
    """Replace a box of (1 - share) of the area by the partner's; its center is anywhere, its edges are clipped."""
    height, width = images_MCHW.shape[2:]
    side = math.sqrt(1 - share)
    middle_down, middle_right = int(top_draw * height), int(left_draw * width)
    top, bottom = (max(0, min(height, round(middle_down + sign * side * height / 2))) for sign in (-1, 1))
    left, right = (max(0, min(width, round(middle_right + sign * side * width / 2))) for sign in (-1, 1))
    images_MCHW = images_MCHW.clone()
    partners = Mixed.partner(images_MCHW)
    images_MCHW[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return Mixed(images_MCHW, 1 - (bottom - top) * (right - left) / (height * width))


def beta(alpha: float, draws: list[float]) -> float:
    """Draw from Beta(alpha, alpha), as a pure function of uniform draws from [0, 1).

    An alpha up to MAX_REJECTION_ALPHA is drawn by Jöhnk's rejection; above, where that would reject nearly every
    try, by Ulrich's formula (Devroye, Non-Uniform Random Variate Generation, IX.3). NumPy's own beta is not used: its
    algorithm may change between releases.
    """
    if alpha > MAX_REJECTION_ALPHA:
        radius = math.sqrt(1 - draws[0] ** (2 / (2 * alpha - 1)))
        return (1 + radius * math.cos(2 * math.pi * draws[1])) / 2
    for first, second in zip(draws[::2], draws[1::2], strict=True):
        x, y = first ** (1 / alpha), second ** (1 / alpha)
        if 0 < x + y <= 1:
            return float(x / (x + y))
    return 0.5
