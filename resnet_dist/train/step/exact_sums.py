"""Sum gradients so exactly that the order does not matter: the same curve on any number of ranks.

A sum of float32 numbers in another order rounds differently, in the eighth digit. Training doubles such a difference
every few steps: after twenty steps, runs on one rank and on two draw different curves. In float64 the sum of the
float32 gradients of all micro-batches has 29 bits to spare, and rounds to the same float32 in any order.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from resnet_dist.world import World


class ExactSums:
    """The sum of the gradients of micro-batches and ranks in float64, in place of DDP's all-reduce.

    It costs twice the traffic, after the backward pass instead of during it. DDP broadcasts
    the initial weights; this need not, because all ranks draw them from one seed, or read them from one file.
    """

    waits_in_backward = False

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        sizes = [p.numel() for p in self._parameters]
        self._sum = torch.zeros(sum(sizes), dtype=torch.float64, device=world.device)
        self._parts = [
            part.view_as(p) for part, p in zip(self._sum.split(sizes), self._parameters, strict=True)
        ]

    def divisor(self, rank_samples: int, micro_batch_samples: int) -> int:
        return micro_batch_samples  # `finish` divides by the number of micro-batches, in float64.

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def add(self) -> None:
        """Add `.grad` to the sum after the backward pass of a micro-batch, and set `.grad` to zero."""
        torch._foreach_add_(self._parts, self._gradients())
        torch._foreach_zero_(self._gradients())

    def finish(self, num_micro_batches: int) -> None:
        """Put the mean over the micro-batches of all ranks into `.grad`."""
        mean = self._world.sum(self._sum).div_(num_micro_batches)
        means = [
            part.view_as(p)
            for part, p in zip(
                mean.split([p.numel() for p in self._parameters]), self._parameters, strict=True
            )
        ]
        torch._foreach_copy_(self._gradients(), means)
        self._sum.zero_()

    def _gradients(self) -> list[Tensor]:
        gradients = []
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        return gradients
