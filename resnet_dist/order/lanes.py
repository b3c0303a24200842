"""The shuffle inside a lane: each sample gets a key near its position, and samples are emitted in the order of keys.

A key is a random place in a range one window W wide, so that a lane is read nearly in sequence, and any stretch of it
is computed from its neighbourhood alone. Two versions differ in the ranges, in a lane of L samples, h = W // 2:

1. Position i draws from [i, i + W).
2. The same, but the ranges of the first W positions begin at the lane's first key, and those of the last W end at its
   last: they draw from [h, i + W) and [i, L + h).

In version 1 few positions reach the first and the last keys: the first and the last batches of an epoch come from few
neighbouring samples, and so from few classes where shards are sorted by class. In version 2, W positions reach every
key, at the edges with more weight on the nearer ones. In both, the samples that are in play at one time lie within W
of each other, so that no shard is needed for longer, or twice. Wrapping the keys around the lane would mix the edges as
well, but would read the last shards of every lane at the start of the epoch and again at its end.

Distinct classes in a batch of 1,024, with 1,282 shards sorted by class, 64 lanes and a window of 4,096 (see
tests/benchmarks/order_classes.py):

    version   first batch   2nd to 11th   middle   last   mean   shards in use per lane: mean, most
    1              91           141         352      95    339              4.7, 5.0
    2             354           352         352     347    354              5.0, 5.1

A new run has the newest version. A run keeps its version: `order` in run.json.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from resnet_dist.order.philox import Purpose, Words, words_of
from resnet_dist.order.versions import FIRST_VERSION

Ids = NDArray[np.int64]

_FRACTION_BITS = np.uint64(32)  # the bits of a fixed-point key behind its point


def emissions(
    first: int, count: int, *, length: int, window: int, seed: int, epoch: int, lane: int, version: int
) -> Ids:
    """Return the positions in a lane of its emissions first .. first+count-1, (count,).

    Two samples `window` or more apart never change places, so emission e has a position within `window` of e:
    sorting that neighbourhood gives the same as sorting the whole lane.
    """
    low, high = first - window, min(length, first + count + window)
    # In version 2, the ranges of the first W positions start together: count from 0 where one of them is included, or
    # a start could lie before `low`.
    low = 0 if low < window else low
    starts, ends = ranges(low, high, length=length, window=window, version=version)
    # Compute the keys, counted from `low`, in fixed point with 32 bits of fraction. They are exact, so that ties are
    # broken the same way on every machine.
    delays = _delays(low, high, seed=seed, epoch=epoch, lane=lane).astype(np.uint64)
    keys = ((starts - low).view(np.uint64) << _FRACTION_BITS) + (ends - starts).view(np.uint64) * delays
    chosen = slice(first - low, first - low + count)
    offset_bits = (high - low).bit_length()
    if int(ends.max() - low).bit_length() + 32 + offset_bits > 64:
        return low + np.argsort(keys, kind="stable")[chosen]
    # Append the offset to the low bits of each key and sort the keys: several times faster than argsort.
    keys = np.sort((keys << np.uint64(offset_bits)) | np.arange(high - low, dtype=np.uint64))[chosen]
    return low + (keys & np.uint64((1 << offset_bits) - 1)).astype(np.int64)


def ranges(low: int, high: int, *, length: int, window: int, version: int) -> tuple[Ids, Ids]:
    """Return where the ranges of the keys of positions low .. high-1 start and end, (high - low,) each.

    Both ascend with the position, and from one position to another `window` further on, they do not overlap.
    """
    starts = np.arange(low, high)
    ends = starts + window
    if version > FIRST_VERSION:
        half = window // 2
        starts[: max(0, window - low)] = half
        ends[max(0, length - window - low) :] = length + half
    return starts, ends


def _delays(low: int, high: int, *, seed: int, epoch: int, lane: int) -> Words:
    """Return U of the positions low .. high-1 of a lane, in units of 2**-32. Four positions share a counter."""
    counters = np.arange(low // 4, (high + 3) // 4)
    words = words_of(counters, Purpose.DELAY, seed=seed, epoch=epoch, sub=lane)
    return words.reshape(-1)[low - 4 * (low // 4) :][: high - low]
