"""Which samples make up step s: a pure function of (shard counts, seed, epoch, batch size, lanes, window, repeats).

1. Shuffle the shards by (seed, epoch), lay their samples end to end, and turn that ring to a random start.
2. Cut the sequence into `lanes` equal, contiguous lanes; a step takes as many samples from every lane.
3. Inside a lane, sample i leaves in order of the key i + U·window. A lane is so read nearly in sequence.
4. A rank owns neighbouring lanes, so any number of ranks that divides the lanes sees the same global batches.
5. With repeats, a step takes fewer samples, and each of them so many times: all copies come from its lane.

Position is the step, nothing else. Because a sample moves by less than `window`, any stretch of a lane is
computed from its neighbourhood alone: resuming in the middle costs what starting does, and a billion samples
take no more memory than a thousand.

Shapes: S shards, N samples, L samples per lane, P samples of a step per lane, D of them distinct, R times each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from resnet_dist.order.philox import Purpose, Words, permutation, uniform, words_of

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

    def shards(self, low: int, high: int) -> list[int]:
        """Shards under the positions low..high of the sequence, in reading order."""
        first, last = ((p + self.rotation) % self.num_samples for p in (low, high))
        i, j = (int(k) - 1 for k in self.starts_S.searchsorted([first, last], side="right"))
        count = (j - i) % len(self.shards_S) + 1
        if i == j and last < first:  # all the way round
            count = len(self.shards_S) + 1
        return [int(self.shards_S[(i + k) % len(self.shards_S)]) for k in range(count)]


@dataclass(eq=False)
class Order:
    """The order of every epoch over one index.

    counts: samples in every shard, in the order of the index; sample ids count through them.
    training: shuffle, and drop the tail of an epoch (other samples each time). Otherwise keep the order of
        the index, and fill the last step with PADDING.
    repeats: how often a step has each of its samples. An epoch is all samples as many times.
    """

    counts: Sequence[int]
    global_batch_size: int
    lanes: int
    window: int
    seed: int
    training: bool
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.lanes * self.repeats):
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of lanes={self.lanes} times "
                f"repeats={self.repeats}"
            )
        self.num_samples = sum(self.counts)
        # What is being read: this epoch and the next, and the block of each lane that begins before one ends.
        self._layout = lru_cache(maxsize=2)(self._compute_layout)
        self._block = lru_cache(maxsize=2 * self.lanes)(self._compute_block)

    @property
    def steps_per_epoch(self) -> int:
        whole, tail = divmod(self.num_samples, self.lanes * self.distinct_per_lane)
        return whole if self.training or tail == 0 else whole + 1

    @property
    def per_lane(self) -> int:
        """P: samples that a step takes from one lane."""
        return self.global_batch_size // self.lanes

    @property
    def distinct_per_lane(self) -> int:
        """D: samples that a step takes from one lane, copies not counted."""
        return self.per_lane // self.repeats

    @property
    def lane_length(self) -> int:
        """L: samples of an epoch in one lane."""
        return self.steps_per_epoch * self.distinct_per_lane

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The neighbouring lanes that a rank reads. Raises ValueError where ranks do not divide lanes."""
        if self.lanes % world_size:
            raise ValueError(f"world_size={world_size} does not divide lanes={self.lanes}")
        share = self.lanes // world_size
        return range(rank * share, (rank + 1) * share)

    def ids_at(self, step: int, lanes: Sequence[int]) -> Ids:
        """Sample ids that `lanes` contribute to a step, lane by lane: (len(lanes) * P,).

        `step` counts from the start of training, through all epochs. Of a lane, each sample once comes before any
        of them again, so that mixing with the neighbour mixes different samples.
        """
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.distinct_per_lane
        return np.concatenate([np.tile(self._lane_ids(epoch, lane, first), self.repeats) for lane in lanes])

    def rows_of_samples(self, num_lanes: int) -> Ids:
        """Where each sample is in the `ids_at` of so many lanes, its copies in their order: (num_lanes * D, R)."""
        rows = np.arange(num_lanes * self.per_lane)
        by_lane = rows.reshape(num_lanes, self.repeats, self.distinct_per_lane)  # lane, copy, sample
        return by_lane.transpose(0, 2, 1).reshape(-1, self.repeats)

    def shards_ahead(self, step: int, lanes: Sequence[int], steps: int) -> list[int]:
        """Numbers of the shards that `lanes` read in the `steps` from `step` on, the first needed first."""
        first, last = step % self.steps_per_epoch, step % self.steps_per_epoch + steps
        numbers = self._shards_of(step // self.steps_per_epoch, lanes, first, last)
        if last > self.steps_per_epoch:
            numbers += self._shards_of(
                step // self.steps_per_epoch + 1,
                lanes,
                0,
                min(last - self.steps_per_epoch, self.steps_per_epoch),
            )
        return list(dict.fromkeys(numbers))

    def _shards_of(self, epoch: int, lanes: Sequence[int], first_step: int, end_step: int) -> list[int]:
        """Shards under the positions that may be read from `first_step` to `end_step`, lane beside lane."""
        delay = self.window if self.training else 0
        starts = np.array(lanes, np.int64) * self.lane_length
        low = starts + max(0, first_step * self.distinct_per_lane - delay)
        high = starts + min(self.lane_length, end_step * self.distinct_per_lane + delay) - 1
        high = np.minimum(high, self.num_samples - 1)
        layout = self._layout(epoch) if self.training else self._plain_layout
        spans = [layout.shards(int(a), int(b)) for a, b in zip(low, high, strict=True) if a <= b]
        return [n for row in itertools.zip_longest(*spans) for n in row if n is not None]

    def _lane_ids(self, epoch: int, lane: int, first: int) -> Ids:
        """The D ids of `lane` from its `first`-th emission on."""
        count = self.distinct_per_lane
        if not self.training:
            positions = lane * self.lane_length + first + np.arange(count)
            return np.where(positions < self.num_samples, positions, PADDING)
        block = self._block_length
        low, high = first // block, (first + count - 1) // block
        offset = first - low * block
        if low == high:  # as most: a block holds many steps
            return self._block(epoch, lane, low)[offset : offset + count]
        ids = [self._block(epoch, lane, number) for number in range(low, high + 1)]
        return np.concatenate(ids)[offset : offset + count]

    @property
    def _block_length(self) -> int:
        # The shuffle of a block looks one window to either side: two windows a block wastes half, not two thirds.
        return max(2 * self.window, self.distinct_per_lane)

    @cached_property
    def _plain_layout(self) -> Layout:
        counts_S = np.array(self.counts, dtype=np.int64)
        starts_S = np.cumsum(counts_S) - counts_S
        return Layout(np.arange(len(counts_S)), starts_S, starts_S, 0, self.num_samples)

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
    # i + U·window, counted from `low`, with 32 bits of fraction: exact, so that ties break the same everywhere.
    offsets = np.arange(high - low, dtype=np.uint64)
    delays = _delays(low, high, seed=seed, epoch=epoch, lane=lane).astype(np.uint64)
    keys = (offsets << np.uint64(32)) + np.uint64(window) * delays
    chosen = slice(first - low, first - low + count)
    offset_bits = (high - low).bit_length()
    if (high - low + window).bit_length() + 32 + offset_bits > 64:
        return low + np.argsort(keys, kind="stable")[chosen]
    # With the offset below each key, sorting keys sorts offsets: several times faster than finding an order.
    keys = np.sort((keys << np.uint64(offset_bits)) | offsets)[chosen]
    return low + (keys & np.uint64((1 << offset_bits) - 1)).astype(np.int64)


def _delays(low: int, high: int, *, seed: int, epoch: int, lane: int) -> Words:
    """U of the positions low .. high-1 of a lane, in parts of 2**32: four of them share a counter."""
    counters = np.arange(low // 4, (high + 3) // 4)
    words = words_of(counters, Purpose.DELAY, seed=seed, epoch=epoch, sub=lane)
    return words.reshape(-1)[low - 4 * (low // 4) :][: high - low]
