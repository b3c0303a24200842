"""The random draws of a batch: all that augmentation decides by chance, from each sample's identity alone.

Shapes: N rows of a batch, K draws of a row, of which groups of four serve one try or one operation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from resnet_dist.config import Data
from resnet_dist.order.philox import Purpose, uniform, words_of

Draws = NDArray[np.float64]

CROP_TRIES = 10  # as in torchvision's RandomResizedCrop


@dataclass(frozen=True)
class Randomness:
    """Uniform draws from [0, 1) for every row of a batch; an augmentation that the recipe does not use has K = 0."""

    batch_N4: Draws  # flip, shift down, shift right, erase
    flip_N: NDArray[np.bool]  # True where the image is mirrored
    crop_NK: Draws  # four for each of CROP_TRIES: area, ratio, top, left
    policy_NK: Draws  # four for each operation: operation, sign and interpolation, level, probability
    color_N4: Draws  # brightness, contrast, saturation, order
    erase_N4: Draws  # area, ratio, top, left

    def rows(self, rows: slice | NDArray[np.int64]) -> Randomness:
        return Randomness(*(getattr(self, field.name)[rows] for field in fields(self)))


def randomness(
    ids_N: NDArray[np.int64],
    data: Data,
    *,
    seed: int,
    epoch: int,
    copies_N: NDArray[np.int64] | None = None,
) -> Randomness:
    """Draw from (seed, epoch, sample id, copy) alone: the same on any rank, and after any restart.

    copies_N: the number of each row among the `data.repeats` copies of its sample. Default: 0 for all.
    """
    if copies_N is None:
        copies_N = np.zeros(len(ids_N), np.int64)

    def draw(purpose: Purpose, blocks: int) -> Draws:
        if blocks == 0:
            return np.empty((len(ids_N), 0))
        return uniform(words_of(ids_N, purpose, seed=seed, epoch=epoch, sub=copies_N, blocks=blocks))

    policy_blocks = {"none": 0, "rand-augment": data.policy_ops, "trivial-augment": 1}
    batch_N4 = draw(Purpose.AUGMENT, 1)
    if data.flip == "alternate":
        times_seen_N = epoch * data.repeats + copies_N
        first_N = words_of(ids_N, Purpose.FLIP, seed=seed, epoch=0)[:, 0] & 1
        flip_N = (first_N + times_seen_N) % 2 == 1
    else:
        flip_N = (batch_N4[:, 0] < 0.5) & data.flip
    return Randomness(
        batch_N4,
        flip_N,
        draw(Purpose.CROP, CROP_TRIES if data.crop == "random-resized-crop" else 0),
        draw(Purpose.POLICY, policy_blocks[data.policy]),
        draw(Purpose.COLOR, 1 if data.color_jitter else 0),
        draw(Purpose.ERASE, 1 if data.erase else 0),
    )
