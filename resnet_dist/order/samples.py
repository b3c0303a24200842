"""The samples of step s: a pure function of (shard counts, seed, epoch, batch size, lanes, window, repeats, version).

1. Shuffle the shards by (seed, epoch), lay their samples end to end as a ring, and begin it at a random place.
2. Cut this sequence into `lanes` equal, contiguous lanes; a step takes the same number of samples from each.
3. Inside a lane, emit the samples in the order of keys, each a random place within `window` of its sample (see
   lanes.py). So a lane is read nearly in sequence.
4. A rank owns neighbouring lanes, so any number of ranks that divides the lanes sees the same global batches.
5. With repeats, a step takes fewer samples, each of them `repeats` times; all copies come from the same lane.

The position in training is the step, nothing else. Because a sample moves by less than `window`, any stretch of a
lane is computed from its neighbourhood alone: resuming in the middle costs the same as starting, and a billion
samples take no more memory than a thousand.

Shapes: S shards, N samples, L samples per lane, P samples of a step per lane, D of them distinct, R times each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from resnet_dist.order.lanes import Ids, emissions
from resnet_dist.order.philox import Purpose, permutation, uniform, words_of
from resnet_dist.order.versions import NEWEST_VERSION

PADDING = -1  # sample id of the unused places in the last step of an evaluation


@dataclass(frozen=True)
class Layout:
    """The sequence of one epoch: its shards in their order, and the start of each."""

    shards_S: Ids  # shard numbers, in the order of the sequence
    starts_S: Ids  # place of the first sample of shards_S[j] before the rotation
    bases_S: Ids  # sample id of the first sample of shards_S[j]
    rotation: int  # place at which the sequence begins
    num_samples: int

    def ids(self, positions: Ids) -> Ids:
        """Return the sample ids at `positions` 0..N-1 of the sequence, the same shape."""
        rotated = (positions + self.rotation) % self.num_samples
        j = np.searchsorted(self.starts_S, rotated, side="right") - 1
        return self.bases_S[j] + rotated - self.starts_S[j]

    def shards(self, low: int, high: int) -> list[int]:
        """Return the numbers of the shards at positions low..high of the sequence, in reading order."""
        first, last = ((p + self.rotation) % self.num_samples for p in (low, high))
        i, j = (int(k) - 1 for k in self.starts_S.searchsorted([first, last], side="right"))
        count = (j - i) % len(self.shards_S) + 1
        if i == j and last < first:  # the range ends in the shard where it began, after a whole turn
            count = len(self.shards_S) + 1
        return [int(self.shards_S[(i + k) % len(self.shards_S)]) for k in range(count)]


@dataclass(eq=False)
class Order:
    """The order of every epoch over one index.

    counts: the number of samples in every shard, in the order of the index; sample ids count through them.
    training: shuffle, and drop the samples that do not fill a step, which differ from epoch to epoch. Otherwise keep
        the order of the index, and fill the last step with PADDING.
    repeats: the number of copies of each sample in its step. An epoch has every sample that many times.
    version: of the shuffle inside a lane, see lanes.py. A run keeps the one it began with.

    Raises ValueError where global_batch_size is not a multiple of lanes times repeats.
    """

    counts: Sequence[int]
    global_batch_size: int
    lanes: int
    window: int
    seed: int
    training: bool
    repeats: int = 1
    version: int = NEWEST_VERSION

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.lanes * self.repeats):
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of lanes={self.lanes} times "
                f"repeats={self.repeats}"
            )
        self.num_samples = sum(self.counts)
        # Keep what the loader reads at the same time: two epochs, and in each lane two blocks.
        self._layout = lru_cache(maxsize=2)(self._compute_layout)
        self._block = lru_cache(maxsize=2 * self.lanes)(self._compute_block)

    @property
    def steps_per_epoch(self) -> int:
        whole, tail = divmod(self.num_samples, self.lanes * self.distinct_per_lane)
        return whole if self.training or tail == 0 else whole + 1

    @property
    def per_lane(self) -> int:
        """Return P, the samples that a step takes from one lane."""
        return self.global_batch_size // self.lanes

    @property
    def distinct_per_lane(self) -> int:
        """Return D, the samples that a step takes from one lane, copies not counted."""
        return self.per_lane // self.repeats

    @property
    def lane_length(self) -> int:
        """Return L, the samples of an epoch in one lane, copies not counted."""
        return self.steps_per_epoch * self.distinct_per_lane

    @property
    def fetch_steps(self) -> int:
        """Return the steps by which the fetch of a shard precedes its first use: those of a window and half a shard."""
        return (self.window + self.num_samples // len(self.counts) // 2) // self.distinct_per_lane

    def lanes_of(self, rank: int, world_size: int) -> range:
        """Return the neighbouring lanes that a rank reads. Raises ValueError where world_size does not divide lanes."""
        if self.lanes % world_size:
            raise ValueError(f"world_size={world_size} does not divide lanes={self.lanes}")
        share = self.lanes // world_size
        return range(rank * share, (rank + 1) * share)

    def ids_at(self, step: int, lanes: Sequence[int]) -> Ids:
        """Return the sample ids that `lanes` contribute to a step, lane by lane, (len(lanes) * P,).

        `step` counts from the start of training, through all epochs. In a lane, all samples come once before the
        first one comes again, so that mixup with the neighbour in the batch mixes different samples.
        """
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.distinct_per_lane
        return np.concatenate([np.tile(self._lane_ids(epoch, lane, first), self.repeats) for lane in lanes])

    def distinct_ids_at(self, step: int, lanes: Sequence[int]) -> Ids:
        """Return the sample ids that `lanes` contribute to a step, each once, lane by lane, (len(lanes) * D,)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.distinct_per_lane
        return np.concatenate([self._lane_ids(epoch, lane, first) for lane in lanes])

    def rows_of_samples(self, num_lanes: int) -> Ids:
        """Return the rows of each sample's copies in `ids_at` of `num_lanes` lanes, (num_lanes * D, R)."""
        rows = np.arange(num_lanes * self.per_lane)
        by_lane = rows.reshape(num_lanes, self.repeats, self.distinct_per_lane)  # (lane, copy, sample)
        return by_lane.transpose(0, 2, 1).reshape(-1, self.repeats)

    def shards_ahead(self, step: int, lanes: Sequence[int], steps: int) -> list[int]:
        """Return the numbers of the shards that `lanes` read in `steps` steps from `step` on, first needed first."""
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
        """Return the shards that may be read in steps first_step..end_step-1 of an epoch.

        They come in the order of need: the first of every lane, then the second of every lane, and so on.
        """
        delay = self.window if self.training else 0
        starts = np.array(lanes, np.int64) * self.lane_length
        low = starts + max(0, first_step * self.distinct_per_lane - delay)
        high = starts + min(self.lane_length, end_step * self.distinct_per_lane + delay) - 1
        high = np.minimum(high, self.num_samples - 1)
        layout = self._layout(epoch) if self.training else self._plain_layout
        spans = [layout.shards(int(a), int(b)) for a, b in zip(low, high, strict=True) if a <= b]
        return [n for row in itertools.zip_longest(*spans) for n in row if n is not None]

    def _lane_ids(self, epoch: int, lane: int, first: int) -> Ids:
        """Return D sample ids of `lane`, beginning with its emission `first`."""
        count = self.distinct_per_lane
        if not self.training:
            positions = lane * self.lane_length + first + np.arange(count)
            return np.where(positions < self.num_samples, positions, PADDING)
        block = self._block_length
        low, high = first // block, (first + count - 1) // block
        offset = first - low * block
        if low == high:  # the usual case, because a block holds many steps
            return self._block(epoch, lane, low)[offset : offset + count]
        ids = [self._block(epoch, lane, number) for number in range(low, high + 1)]
        return np.concatenate(ids)[offset : offset + count]

    @property
    def _block_length(self) -> int:
        # A block is computed with one window more on either side. With blocks of two windows half of the work is
        # for those sides; with blocks of one window it would be two thirds.
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
            version=self.version,
        )
        return self._layout(epoch).ids(lane * length + in_lane)


def layout_of(counts: Sequence[int], *, seed: int, epoch: int) -> Layout:
    """Return the shuffled sequence of an epoch. counts: samples in every shard, in the order of the index."""
    counts_S = np.array(counts, dtype=np.int64)
    num_samples = int(counts_S.sum())
    bases_S = np.cumsum(counts_S) - counts_S
    shards_S = permutation(len(counts), Purpose.SHARDS, seed=seed, epoch=epoch)
    starts_S = np.cumsum(counts_S[shards_S]) - counts_S[shards_S]
    # Rotate the sequence: without that, a set of one shard would drop the same samples in every epoch.
    word = words_of(np.zeros(1, np.int64), Purpose.ROTATION, seed=seed, epoch=epoch)
    rotation = int(uniform(word)[0, 0] * num_samples)
    return Layout(shards_S, starts_S, bases_S[shards_S], rotation, num_samples)
