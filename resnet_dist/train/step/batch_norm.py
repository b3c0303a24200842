"""Running statistics of batch norm that do not depend on the number of ranks.

Batch norm updates running = (1 - m)·running + m·statistic once per forward pass. By default two micro-batches on one
rank decay it twice, and two ranks keep two different averages, of which a checkpoint saves one. Here a step moves it
once, towards the mean of the statistics of all its micro-batches on all ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_dist.world import World


class RunningStatistics:
    """The running statistics of one model's batch norms, updated step by step.

    `compiled`: the model's code is compiled, and holds the momentum of its norms as a constant.
    """

    def __init__(self, model: nn.Module, world: World, *, compiled: bool = False) -> None:
        self._world, self._compiled = world, compiled
        self._norms = [
            (m, m.momentum) for m in model.modules() if isinstance(m, _BatchNorm) and m.momentum is not None
        ]
        # The statistics of SyncBatchNorm are over all ranks already.
        self._local = [
            b for m, _ in self._norms for b in _statistics(m) if not isinstance(m, nn.SyncBatchNorm)
        ]
        self._sum = torch.empty(0)
        self._wait: Callable[[], object] | None = None

    def begin_micro_batch(self, number: int, count: int) -> None:
        """Prepare the norms for forward pass `number` (from zero) of `count` in a step on this rank.

        After `count` passes each statistic has weight momentum / count, and the value before the step has weight
        1 - momentum. With one pass this is the plain momentum.
        """
        if self._compiled:
            self._scale_up(number, count)
            return
        for norm, momentum in self._norms:
            share = momentum / count
            _set_momentum(norm, share / (1 - share * (count - 1 - number)))

    def _scale_up(self, number: int, count: int) -> None:
        """Reach the same weights with one momentum for all passes: enlarge before a pass what it will shrink.

        With a momentum for each pass, the model would be compiled once for each.
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
        """Begin to sum over ranks, after the last forward pass of a step and while the backward pass runs.

        It replaces DDP's own broadcast of buffers: the traffic is the same, but computation hides it.
        """
        if self._world.world_size > 1 and self._local:
            self._sum = torch.cat(self._local)
            self._wait = self._world.begin_sum(self._sum)

    def finish_average(self) -> None:
        """Finish the sum after the backward pass, and store the mean: all ranks then hold the same state."""
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
    # Skip an equal value: to set an attribute of a module takes a microsecond or two.
    if norm.momentum != momentum:
        norm.momentum = momentum
