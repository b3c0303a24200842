"""Running sums between two log lines. They stay on the device until a log is due.

Shapes: R ranks, M micro-batches of a step on this rank, K sums.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_dist.world import World

LOSS, CORRECT, SEEN, BAD, FINITE = range(5)


@dataclass(frozen=True)
class NotFinite:
    """The first micro-batch whose loss was not finite: whose it was, and how many steps ago (0: the last one)."""

    steps_ago: int
    rank: int
    micro_batch: int


class Meter:
    """Sums of this rank since the last log line: loss, correct, samples seen, bad samples.

    The fifth counts micro-batches up to the first loss that is not finite: which one that was is known
    at the next log line, without a host synchronisation in any step.
    """

    def __init__(self, device: torch.device) -> None:
        # float64: a sum of many batches loses nothing, and a restart in the middle does not show
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        self.bad: list[str] = []  # keys and reasons, of this rank
        self.bad_at_last_flush = 0  # of all ranks
        self.not_finite: NotFinite | None = None  # of all ranks, as of the last `gather` or `flush`
        self._table_RK: Tensor | None = None  # all ranks' sums, as of `gather`
        self._steps, self._micro_batches = 0, 0  # that FINITE has counted, had all been finite
        self._wait_seconds = 0.0
        self._start = time.perf_counter()
        self._samples_here = 0

    def add(self, sums_M3: Tensor, *, samples: int, bad: Sequence[str], wait_seconds: float) -> None:
        """`sums_M3`: loss, correct and seen of every micro-batch of one step."""
        # A loss that is not finite stays so in the running sum: micro-batches after it are not counted.
        running_M = self.sums[LOSS] + sums_M3[:, LOSS].cumsum(dim=0)
        self.sums[FINITE].add_(running_M.isfinite().sum())  # += would copy the slice back
        self.sums[:BAD].add_(sums_M3.sum(dim=0))
        if bad:
            self.sums[BAD] += len(bad)
            self.bad += bad
        self._table_RK = None
        self._steps += 1
        self._micro_batches += len(sums_M3)
        self._samples_here += samples
        self._wait_seconds += wait_seconds

    def gather(self, world: World) -> None:
        """Learn all ranks' sums, which a checkpoint takes along. Waits for the device."""
        table_RK = world.stack(self.sums).cpu()
        self.not_finite = self._first_not_finite(table_RK)
        self._table_RK = table_RK[:, :FINITE]

    def table(self) -> Tensor:
        """(R, 4) sums of all ranks at the last `gather`; of this one where there was none."""
        return self.sums[None, :FINITE] if self._table_RK is None else self._table_RK

    def load(self, table_RK: Tensor, world: World) -> None:
        """Go on from a checkpoint's sums: as many ranks as then take up their own, others share them out."""
        table_RK = table_RK.reshape(-1, FINITE)  # 0.2.0 wrote the sums over all ranks, as a vector
        if len(table_RK) == world.world_size:
            own_K = table_RK[world.rank]
        else:  # summed up once; only the order of a sum shows, in its last bits
            own_K = table_RK.sum(dim=0) if world.is_main else torch.zeros_like(table_RK[0])
        self._begin_interval()
        self.sums[:FINITE] = own_K

    def flush(self, world: World) -> dict[str, float]:
        """Metrics over all ranks since the last flush; starts the next interval."""
        self.gather(world)
        loss, correct, seen, bad = self.table().sum(dim=0).tolist()
        seconds = time.perf_counter() - self._start
        metrics = {
            "train/loss": loss / seen if seen else math.nan,
            "train/top1": correct / seen if seen else math.nan,
            "data/bad_samples": bad,
            "perf/images_per_second": self._samples_here * world.world_size / seconds,
            "perf/data_wait_fraction": self._wait_seconds / seconds,
        }
        self.bad_at_last_flush = round(bad)
        self._begin_interval()
        self.restart_clock()
        return metrics

    def take_bad(self, world: World) -> list[str]:
        """What all ranks found to be bad since the last call. A collective."""
        mine, self.bad = self.bad, []
        return sorted(text for texts in world.gather(mine) for text in texts)

    def restart_clock(self) -> None:
        """Leave out what was not training, such as an evaluation."""
        self._start = time.perf_counter()
        self._samples_here, self._wait_seconds = 0, 0.0

    def _begin_interval(self) -> None:
        self.sums.zero_()
        self._table_RK = None
        self._steps, self._micro_batches = 0, 0

    def _first_not_finite(self, table_RK: Tensor) -> NotFinite | None:
        finite, rank = min((int(count), rank) for rank, count in enumerate(table_RK[:, FINITE].tolist()))
        if finite == self._micro_batches:
            return None
        step, micro_batch = divmod(finite, self._micro_batches // self._steps)
        return NotFinite(self._steps - 1 - step, rank, micro_batch)
