"""Running sums between two log lines. They stay on the device until a log is due."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_dist.world import World


class TrainingError(RuntimeError):
    """Training that cannot go on, told in one sentence."""


LOSS, CORRECT, SEEN, BAD = range(4)


class Meter:
    """Sums of this rank since the last log line: loss, correct, samples seen, bad samples."""

    def __init__(self, device: torch.device) -> None:
        # float64: a sum of many batches loses nothing, and a restart in the middle does not show
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.bad: list[str] = []  # keys and reasons, of this rank
        self.bad_at_last_flush = 0  # of all ranks
        self._wait_seconds = 0.0
        self._start = time.perf_counter()
        self._samples_here = 0

    def add(self, sums: Tensor, *, samples: int, bad: Sequence[str], wait_seconds: float) -> None:
        """`sums`: loss, correct and seen of one step, as a tensor of three."""
        self.sums[:BAD].add_(sums)
        if bad:
            self.sums[BAD] += len(bad)
            self.bad += bad
        self._samples_here += samples
        self._wait_seconds += wait_seconds

    def gather(self, world: World) -> None:
        """Move all ranks' sums to rank 0, where a checkpoint takes them along."""
        total = world.sum(self.sums)
        self.sums = total if world.is_main else torch.zeros_like(total)

    def flush(self, world: World) -> dict[str, float]:
        """Metrics over all ranks since the last flush; starts the next interval."""
        loss, correct, seen, bad = world.sum(self.sums).tolist()  # waits for the device
        seconds = time.perf_counter() - self._start
        metrics = {
            "train/loss": loss / seen if seen else math.nan,
            "train/top1": correct / seen if seen else math.nan,
            "data/bad_samples": bad,
            "perf/images_per_second": self._samples_here * world.world_size / seconds,
            "perf/data_wait_fraction": self._wait_seconds / seconds,
        }
        self.bad_at_last_flush = round(bad)
        self.sums.zero_()
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
