"""Running statistics of batch norm that do not depend on the number of ranks.

Batch norm keeps running = (1 - m)·running + m·statistic, once per forward pass. Left alone, two micro-batches
on one rank decay it twice, and two ranks keep two different averages of which a checkpoint saves one. Here a
step of any number of micro-batches on any number of ranks moves it once, towards the mean of all their
statistics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_dist.world import World


class RunningStatistics:
    """The batch norms of one model, driven step by step."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        self._norms = [
            (m, m.momentum) for m in model.modules() if isinstance(m, _BatchNorm) and m.momentum is not None
        ]
        self._set_for: tuple[int, int] | None = None  # the forward pass that the momentums suit
        self._sum: Callable[[], Tensor] | None = None  # over the ranks, under way
        self._buffers = [b for m, _ in self._norms for b in (m.running_mean, m.running_var) if b is not None]

    def begin_micro_batch(self, number: int, count: int) -> None:
        """Before forward pass `number` (from zero) of `count` in a step on this rank."""
        if (number, count) == self._set_for:  # as always where a step is one pass: setting them takes time
            return
        self._set_for = (number, count)
        for norm, momentum in self._norms:
            # So chosen that after `count` passes each statistic weighs momentum / count, and what was there
            # before weighs 1 - momentum: with one pass, it is the plain momentum.
            share = momentum / count
            norm.momentum = share / (1 - share * (count - 1 - number))

    def begin_average(self) -> None:
        """After the last forward pass of a step: begin the mean over ranks, so that all will hold the same state.

        It is on its way during the backward pass, which does not read the statistics. As much traffic as DDP's
        own broadcast of buffers, which this replaces, and for which a forward pass would wait.
        """
        if self._world.world_size > 1 and self._buffers:
            self._sum = self._world.begin_sum(torch.cat(self._buffers))

    def finish_average(self) -> None:
        """After the backward pass."""
        if self._sum is None:
            return
        flat, self._sum = self._sum().div_(self._world.world_size), None
        parts = flat.split([buffer.numel() for buffer in self._buffers])
        torch._foreach_copy_(self._buffers, list(parts))
