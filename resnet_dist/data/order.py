"""Which samples make up step s: a pure function of (shard counts, seed, epoch, batch size, lanes, window).

1. Shuffle the shards by (seed, epoch), lay their samples end to end, and turn that ring to a random start.
2. Cut the sequence into `lanes` equal, contiguous lanes; a step takes as many samples from every lane.
3. Inside a lane, sample i leaves in order of the key i + U·window. A lane is so read nearly in sequence.
4. A rank owns neighbouring lanes, so any number of ranks that divides the lanes sees the same global batches.

Position is the step, nothing else. Because a sample moves by less than `window`, any stretch of a lane is
computed from its neighbourhood alone: resuming in the middle costs what starting does, and a billion samples
take no more memory than a thousand.

Shapes: S shards, N samples, L samples per lane, P samples of a step per lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from resnet_dist.data.philox import Purpose, permutation, uniform, words_of

Ids = NDArray[np.int64]

PADDING = -1  # stands where a last evaluation step has no sample left


@dataclass(frozen=True)
class Layout:
    """The sequence of one epoch: shards in their order, and where each begins."""

    shards_S: Ids
    starts_S: Ids  # first position of shards_S[j] in the sequence
    bases_S: Ids  # sample id of the first sample of shards_S[j]
    rotation: int
    num_samples: int

    def ids(self, positions: Ids) -> Ids:
        """Positions 0..N-1 in the sequence → sample ids, the same shape."""
        turned = (positions + self.rotation) % self.num_samples
        j = np.searchsorted(self.starts_S, turned, side="right") - 1
        return self.bases_S[j] + turned - self.starts_S[j]


@dataclass(eq=False)
class Order:
    """The order of every epoch over one index.

    counts: samples in every shard, in the order of the index; sample ids count through them.
    training: shuffle, and drop the tail of an epoch (other samples each time). Otherwise keep the order of
        the index, and fill the last step with PADDING.
    """

    counts: Sequence[int]
    global_batch_size: int
    lanes: int
    window: int
    seed: int
    training: bool

    def __post_init__(self) -> None:
        if self.global_batch_size % self.lanes:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of lanes={self.lanes}"
            )
        self.num_samples = sum(self.counts)
        # What is being read: this epoch and the next, and the block of each lane that begins before one ends.
        self._layout = lru_cache(maxsize=2)(self._compute_layout)
        self._block = lru_cache(maxsize=2 * self.lanes)(self._compute_block)

    @property
    def steps_per_epoch(self) -> int:
        whole, tail = divmod(self.num_samples, self.global_batch_size)
        return whole if self.training or tail == 0 else whole + 1

    @property
    def per_lane(self) -> int:
        """P: samples that a step takes from one lane."""
        return self.global_batch_size // self.lanes

    @property
    def lane_length(self) -> int:
        """L: samples of an epoch in one lane."""
        return self.steps_per_epoch * self.per_lane

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The neighbouring lanes that a rank reads. Raises ValueError where ranks do not divide lanes."""
        if self.lanes % world_size:
            raise ValueError(f"world_size={world_size} does not divide lanes={self.lanes}")
        share = self.lanes // world_size
        return range(rank * share, (rank + 1) * share)

    def ids_at(self, step: int, lanes: Sequence[int]) -> Ids:
        """Sample ids that `lanes` contribute to a step, lane by lane: (len(lanes) * P,).

        `step` counts from the start of training, through all epochs.
        """
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.per_lane
        return np.concatenate([self._lane_ids(epoch, lane, first) for lane in lanes])

    def _lane_ids(self, epoch: int, lane: int, first: int) -> Ids:
        """The P ids of `lane` from its `first`-th emission on."""
        if not self.training:
            positions = lane * self.lane_length + first + np.arange(self.per_lane)
            return np.where(positions < self.num_samples, positions, PADDING)
        block = self._block_length
        low, high = first // block, (first + self.per_lane - 1) // block
        ids = [self._block(epoch, lane, number) for number in range(low, high + 1)]
        offset = first - low * block
        return np.concatenate(ids)[offset : offset + self.per_lane]

    @property
    def _block_length(self) -> int:
        # The shuffle of a block looks one window to either side: two windows a block wastes half, not two thirds.
        return max(2 * self.window, self.per_lane)

    def _compute_layout(self, epoch: int) -> Layout:
        return layout_of(self.counts, seed=self.seed, epoch=epoch)

    def _compute_block(self, epoch: int, lane: int, number: int) -> Ids:
        length, first = self.lane_length, number * self._block_length
        in_lane = emissions(
            first,
            min(self._block_length, length - first),
            length=length,
            window=self.window,
            seed=self.seed,
            epoch=epoch,
            lane=lane,
        )
        return self._layout(epoch).ids(lane * length + in_lane)


def layout_of(counts: Sequence[int], *, seed: int, epoch: int) -> Layout:
    """The shuffled sequence of an epoch."""
    counts_S = np.array(counts, dtype=np.int64)
    num_samples = int(counts_S.sum())
    bases_S = np.cumsum(counts_S) - counts_S
    shards_S = permutation(len(counts), Purpose.SHARDS, seed=seed, epoch=epoch)
    starts_S = np.cumsum(counts_S[shards_S]) - counts_S[shards_S]
    # Without the turn, a set of one shard would drop the same samples from every epoch.
    word = words_of(np.zeros(1, np.int64), Purpose.ROTATION, seed=seed, epoch=epoch)
    rotation = int(uniform(word)[0, 0] * num_samples)
    return Layout(shards_S, starts_S, bases_S[shards_S], rotation, num_samples)


def emissions(first: int, count: int, *, length: int, window: int, seed: int, epoch: int, lane: int) -> Ids:
    """Positions in a lane of its emissions first .. first+count-1, in the order of i + U·window.

    Two samples more than `window` apart never change places, so emission e holds a position within `window`
    of e: sorting that neighbourhood gives what sorting the whole lane would.
    """
    low, high = max(0, first - window), min(length, first + count + window)
    positions = np.arange(low, high)
    keys = positions + window * _delays(low, high, seed=seed, epoch=epoch, lane=lane)
    order = np.argsort(keys, kind="stable")
    return positions[order[first - low : first - low + count]]


def _delays(low: int, high: int, *, seed: int, epoch: int, lane: int) -> NDArray[np.float64]:
    """U of the positions low .. high-1 of a lane: four of them share a counter."""
    counters = np.arange(low // 4, (high + 3) // 4)
    words = words_of(counters, Purpose.DELAY, seed=seed, epoch=epoch, sub=lane)
    return uniform(words.reshape(-1)[low - 4 * (low // 4) :][: high - low])
