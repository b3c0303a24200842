"""Running sums between two log lines. They stay on the device until a log line is due.

Shapes: R ranks, U micro-batches of a step on this rank, K sums, T times of a step, V values of a machine's use.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_dist.system.node.usage import NodeUsage
from resnet_dist.train.state.step_times import NUM_TIMES, step_times, time_metrics
from resnet_dist.train.state.usage_metrics import NUM_USAGE
from resnet_dist.world import World

LOSS, CORRECT, SEEN, BAD, FINITE = range(5)  # places in `Meter.sums`


@dataclass(frozen=True)
class NotFinite:
    """The first micro-batch whose loss was not finite."""

    steps_ago: int  # 0: the last step
    rank: int
    micro_batch: int


class Meter:
    """The sums of this rank since the last log line: loss, correct, samples seen, bad samples.

    The fifth sum counts micro-batches up to the first loss that is not finite. It names that micro-batch at the next
    log line, without a host synchronisation in any step.
    """

    def __init__(self, device: torch.device) -> None:
        # float64: a sum over many batches loses nothing, and a restart in the middle changes nothing.
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        self.bad: list[str] = []  # keys and reasons, on this rank
        self.bad_at_last_flush = 0  # over all ranks
        self.not_finite: NotFinite | None = None  # over all ranks, at the last `gather` or `flush`
        self.times = step_times(device)  # of this rank
        self.times_RT = torch.zeros(1, NUM_TIMES, dtype=torch.float64)  # of all ranks, at the last `gather`
        self.usage = NodeUsage([])  # of this machine, where this rank samples it
        self.usage_RV = torch.zeros(1, NUM_USAGE, dtype=torch.float64)  # of all ranks, at the last `gather`
        self._table_RK: Tensor | None = None  # all ranks' sums at `gather`; None once they have changed
        # Added since the last log line. Where all losses are finite, FINITE counts as many micro-batches.
        self._steps, self._micro_batches = 0, 0
        self._wait_seconds = 0.0
        self._start = time.perf_counter()
        self._samples_here = self._timed_steps = 0

    def add(self, sums_U3: Tensor, *, samples: int, bad: Sequence[str], wait_seconds: float) -> None:
        """Add one step. `sums_U3` holds loss, correct and seen of each of its micro-batches."""
        # After a loss that is not finite the running sum is never finite again: later micro-batches do not count.
        running_U = self.sums[LOSS] + sums_U3[:, LOSS].cumsum(dim=0)
        self.sums[FINITE].add_(running_U.isfinite().sum())  # add_, because += would also copy the slice back
        self.sums[:BAD].add_(sums_U3.sum(dim=0))
        if bad:
            self.sums[BAD] += len(bad)
            self.bad += bad
        self._table_RK = None
        self._steps += 1
        self._micro_batches += len(sums_U3)
        self._samples_here += samples
        self._timed_steps += 1
        self._wait_seconds += wait_seconds

    def gather(self, world: World) -> None:
        """Collect all ranks' sums, for the guard and for a checkpoint. A collective; waits for the device."""
        # One collective for sums, times and use: each costs a round trip between all ranks.
        more = self.sums.new_tensor([*self.times.means(), *self.usage.summary()])
        table = world.stack(torch.cat([self.sums, more])).cpu()
        table_RK, self.times_RT, self.usage_RV = table.split([len(self.sums), NUM_TIMES, NUM_USAGE], dim=1)
        self.not_finite = self._first_not_finite(table_RK)
        self._table_RK = table_RK[:, :FINITE]

    def table(self) -> Tensor:
        """Return (R, 4), the sums of all ranks at the last `gather`; (1, 4), this rank's, where they have changed since."""
        return self.sums[None, :FINITE] if self._table_RK is None else self._table_RK

    def load(self, table_RK: Tensor, world: World) -> None:
        """Continue from a checkpoint's sums: each rank takes its own; on another number of ranks, rank 0 takes all."""
        table_RK = table_RK.reshape(-1, FINITE)  # version 0.2.0 wrote one vector, summed over all ranks
        if len(table_RK) == world.world_size:
            own_K = table_RK[world.rank]
        else:
            # Metrics are sums over ranks, so only the order of summation changes, in the last bits.
            own_K = table_RK.sum(dim=0) if world.is_main else torch.zeros_like(table_RK[0])
        self._begin_interval()
        self.sums[:FINITE] = own_K

    def flush(self, world: World) -> dict[str, float]:
        """Return the metrics over all ranks since the last flush, and start the next interval. A collective."""
        self.gather(world)
        loss, correct, seen, bad = self.table().sum(dim=0).tolist()
        seconds = time.perf_counter() - self._start
        metrics = {
            "train/loss": loss / seen if seen else math.nan,
            "train/top1": correct / seen if seen else math.nan,
            "data/bad_samples": bad,
            "perf/images_per_second": self._samples_here * world.world_size / seconds,
            "perf/data_wait_fraction": self._wait_seconds / seconds,
            **time_metrics(self.times_RT, seconds / max(1, self._timed_steps)),
        }
        self.bad_at_last_flush = round(bad)
        self._begin_interval()
        self.restart_clock()
        return metrics

    def take_bad(self, world: World) -> list[str]:
        """Return what all ranks found to be bad since the last call, sorted. A collective."""
        mine, self.bad = self.bad, []
        return sorted(text for texts in world.gather(mine) for text in texts)

    def restart_clock(self) -> None:
        """Restart the timing, so that it leaves out what was not training, such as an evaluation."""
        self._start = time.perf_counter()
        self._samples_here, self._timed_steps, self._wait_seconds = 0, 0, 0.0
        self.times.restart()

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
