"""Running statistics of batch norm that do not depend on the number of ranks.

Batch norm keeps running = (1 - m)·running + m·statistic, once per forward pass. Left alone, two micro-batches
on one rank decay it twice, and two ranks keep two different averages of which a checkpoint saves one. Here a
step of any number of micro-batches on any number of ranks moves it once, towards the mean of all their
statistics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_dist.world import World


class RunningStatistics:
    """The batch norms of one model, driven step by step.

    `compiled`: the model's code is compiled, and holds the momentum of its norms as a constant.
    """

    def __init__(self, model: nn.Module, world: World, *, compiled: bool = False) -> None:
        self._world, self._compiled = world, compiled
        self._norms = [
            (m, m.momentum) for m in model.modules() if isinstance(m, _BatchNorm) and m.momentum is not None
        ]
        # SyncBatchNorm's are of all ranks already.
        self._local = [
            b for m, _ in self._norms for b in _statistics(m) if not isinstance(m, nn.SyncBatchNorm)
        ]
        self._sum = torch.empty(0)
        self._wait: Callable[[], object] | None = None

    def begin_micro_batch(self, number: int, count: int) -> None:
        """Before forward pass `number` (from zero) of `count` in a step on this rank.

        After `count` passes each statistic weighs momentum / count, and what was there before weighs
        1 - momentum: with one pass, it is the plain momentum.
        """
        if self._compiled:
            self._scale_up(number, count)
            return
        for norm, momentum in self._norms:
            share = momentum / count
            _set_momentum(norm, share / (1 - share * (count - 1 - number)))

    def _scale_up(self, number: int, count: int) -> None:
        """The same with one momentum for all passes: what a pass will shrink is enlarged before it.

        Another momentum for each pass would have the model compiled as often.
        """
        buffers: dict[float, list[Tensor]] = defaultdict(list)
        for norm, momentum in self._norms:
            _set_momentum(norm, momentum / count)
            buffers[momentum] += _statistics(norm)
        if count > 1:
            for momentum, group in buffers.items():
                kept = 1 - momentum if number == 0 else 1.0
                torch._foreach_mul_(group, kept / (1 - momentum / count))

    def begin_average(self) -> None:
        """After the last forward pass of a step: begin to add up over ranks, while the backward pass runs.

        As much traffic as DDP's own broadcast of buffers, which this replaces, and out of the way.
        """
        if self._world.world_size > 1 and self._local:
            self._sum = torch.cat(self._local)
            self._wait = self._world.begin_sum(self._sum)

    def finish_average(self) -> None:
        """After the backward pass: the mean over ranks, so that all hold the same state."""
        if self._wait is None:
            return
        self._wait()
        self._wait = None
        mean = self._sum.div_(self._world.world_size)
        parts = mean.split([buffer.numel() for buffer in self._local])
        torch._foreach_copy_(self._local, list(parts))


def _statistics(norm: _BatchNorm) -> list[Tensor]:
    return [buffer for buffer in (norm.running_mean, norm.running_var) if buffer is not None]


def _set_momentum(norm: _BatchNorm, momentum: float) -> None:
    if norm.momentum != momentum:  # setting an attribute of a module costs a microsecond or two
        norm.momentum = momentum
