"""The random draws for one corruption of one sample: from its id alone, never from a process."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from resnet_dist.order.philox import Purpose, uniform, words_of

MAX_CALLS = 16  # of `Chance.uniform` for one image


class Chance:
    """A sequence of draws. stream: separates corruptions and severities of one sample."""

    def __init__(self, sample_id: int, stream: int) -> None:
        self._ids = np.array([sample_id], np.int64)
        self._stream, self._calls = stream, 0

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """Return draws from [0, 1)."""
        assert self._calls < MAX_CALLS
        count = int(np.prod(shape))
        sub = self._stream * MAX_CALLS + self._calls
        self._calls += 1
        words = words_of(self._ids, Purpose.CORRUPT, seed=0, epoch=0, sub=sub, blocks=-(-count // 4))
        return uniform(words)[0, :count].reshape(shape)

    def normal(self, *shape: int) -> NDArray[np.float64]:
        """Return draws of zero mean and unit variance, by Box and Muller's transform."""
        count = int(np.prod(shape))
        half = -(-count // 2)
        draws = self.uniform(2, half)
        radius, angle = np.sqrt(-2 * np.log1p(-draws[0])), 2 * np.pi * draws[1]
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return both[:count].reshape(shape)
