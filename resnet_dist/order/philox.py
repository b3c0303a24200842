"""Random 32-bit words from identity: a pure function of (seed, epoch, purpose, id), never of a process or of time.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised over the
counter. NumPy's generator of that name gives one stream at a time; a batch needs one stream per sample.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # multipliers, from the paper
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments: golden ratio, sqrt(3) - 1
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10


class Purpose(IntEnum):
    """The use of a stream of random words. Streams of different purposes never share a counter.

    The values decide what every seed draws: never change one.
    """

    SHARDS = 1
    ROTATION = 2
    DELAY = 3
    AUGMENT = 4
    SPLIT = 5
    CROP = 6
    POLICY = 7
    COLOR = 8
    ERASE = 9
    MIX = 10
    DEPTH = 12
    FLIP = 13
    CORRUPT = 14


def philox4x32(counter: tuple[NDArray[np.uint64], ...], key: tuple[int, int]) -> Words:
    """Return four random words per counter, (n, 4). counter: four arrays of n values below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def words_of(
    ids: NDArray[np.int64],
    purpose: Purpose,
    *,
    seed: int,
    epoch: int,
    sub: int | NDArray[np.int64] = 0,
    blocks: int = 1,
) -> Words:
    """Return 4 * blocks random words for each of n ids, (n, 4 * blocks).

    sub: a number for all ids, or one for each, that separates streams of one purpose.
    """
    n = len(ids)
    subs = np.broadcast_to(np.asarray(sub).astype(np.uint64), n)
    wide = np.repeat(ids.astype(np.uint64), blocks)
    block = np.tile(np.arange(blocks, dtype=np.uint64), n)
    stream = np.uint64(purpose) | (block << np.uint64(8))
    counter = (wide & _LOW, wide >> _SHIFT, np.repeat(subs, blocks), stream)
    return philox4x32(counter, (seed & 0xFFFFFFFF, epoch & 0xFFFFFFFF)).reshape(n, 4 * blocks)


def uniform(words: Words) -> NDArray[np.float64]:
    """Return the words as numbers in [0, 1), the same shape."""
    return words.astype(np.float64) * 2.0**-32


def permutation(n: int, purpose: Purpose, *, seed: int, epoch: int = 0) -> NDArray[np.int64]:
    """Return a random order of 0..n-1, the same on every machine and in every release."""
    words = words_of(np.arange(n), purpose, seed=seed, epoch=epoch).astype(np.uint64)
    # Sort by 64 random bits. Equal ones, with probability 2**-64 for a pair, keep their order.
    return np.argsort((words[:, 0] << _SHIFT) | words[:, 1], kind="stable").astype(np.int64)
