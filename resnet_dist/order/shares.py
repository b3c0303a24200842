"""The rows of one rank in every step: the lanes it reads, and the copy of a sample that each row holds.

Without repeats, or with all copies of a sample in one micro-batch, a rank has the rows of neighbouring lanes. Spread
copies lie in different micro-batches: as many neighbouring micro-batches as there are copies make a group, which has
the lanes of all of them, and each micro-batch of a group has every sample of these lanes once. A rank that has a part
of a group reads the lanes of the whole group.

Shapes: B rows of a rank in a step, M samples of a block, R copies of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resnet_dist.config import Data
from resnet_dist.order.lanes import Ids
from resnet_dist.order.samples import Order


@dataclass(frozen=True)
class Share:
    """A rank's share of every step. `ids_at` gives the sample of each row; all else is the same in every step."""

    order: Order
    lanes: range
    """The lanes that the rank reads."""
    copies_B: Ids
    """The number of each row among the copies of its sample in the global batch."""
    blocks: tuple[Ids, ...]
    """Rows (M, R) of the copies that this rank has of M samples, block by block; with R = 1 they are adjacent."""
    spread: bool

    @classmethod
    def of(cls, order: Order, data: Data, rank: int, world_size: int) -> Share:
        """Return the share of a rank. Raises ValueError where world_size does not divide the lanes or micro-batches."""
        micro_batches = data.micro_batches
        if data.spread_repeats and order.repeats > 1 and micro_batches is not None:
            count, rest = divmod(micro_batches, world_size)
            if rest:
                raise ValueError(f"world_size={world_size} does not divide {micro_batches} micro-batches")
            return cls._spread(order, rank * count, count, micro_batches)
        lanes = order.lanes_of(rank, world_size)
        rows_MR = order.rows_of_samples(len(lanes))
        copies_B = np.empty(rows_MR.size, np.int64)
        copies_B[rows_MR] = np.arange(order.repeats)
        return cls(order, lanes, copies_B, (rows_MR,), False)

    @classmethod
    def _spread(cls, order: Order, first: int, count: int, micro_batches: int) -> Share:
        """Return the share that consists of micro-batches first .. first+count-1 of a step."""
        size, repeats = order.global_batch_size // micro_batches, order.repeats
        numbers = np.arange(first, first + count)
        groups = numbers // repeats
        lanes_per_group = repeats * (order.lanes // micro_batches)
        lanes = range(int(groups[0]) * lanes_per_group, (int(groups[-1]) + 1) * lanes_per_group)
        rows = np.arange(count * size).reshape(count, size)
        blocks = tuple(rows[groups == group].T for group in np.unique(groups))
        return cls(order, lanes, np.repeat(numbers % repeats, size), blocks, True)

    def ids_at(self, step: int) -> Ids:
        """Return the sample ids of the rank's rows in a step, (B,)."""
        if not self.spread:
            return self.order.ids_at(step, self.lanes)
        ids, low = self.order.distinct_ids_at(step, self.lanes), 0
        out = np.empty(len(self.copies_B), np.int64)
        for rows_MR in self.blocks:
            out[rows_MR] = ids[low : low + len(rows_MR), None]
            low += len(rows_MR)
        return out
