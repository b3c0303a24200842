"""Sum gradients over micro-batches and ranks: by DDP during the backward pass, or exactly after it (exact_sums.py).

Both leave the mean gradient of the global batch in `.grad`; the step calls them the same way.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, Protocol

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.config import Train
from resnet_dist.world import World

# torch 2.15 renamed the argument, and warns about the old name.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers": False
}


class GradientSums(Protocol):
    """The sum of the gradients of one step: `add` is called for every micro-batch, `finish` once at the end."""

    # True where the last backward pass ends with the wait for the other ranks; False where `finish` does.
    waits_in_backward: bool

    def divisor(self, rank_samples: int, micro_batch_samples: int) -> int:
        """Return the number to divide the sum of a micro-batch's losses by before its backward pass."""

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context for a micro-batch's forward and backward pass; `last`: of the step on this rank."""

    def add(self) -> None:
        """Add the gradients of the micro-batch whose backward pass has ended."""

    def finish(self, num_micro_batches: int) -> None:
        """Put the mean gradient of the global batch into `.grad`; `num_micro_batches` is over all ranks."""


class DdpSums:
    """The sum by DDP's all-reduce, during the last backward pass. In one process `.grad` itself is the sum."""

    waits_in_backward = True

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def divisor(self, rank_samples: int, micro_batch_samples: int) -> int:
        # DDP averages over ranks: a division by this rank's samples makes it the mean over the global batch. A bad
        # sample has weight 0 but counts here: to leave it out of the divisor would cost a collective.
        return rank_samples

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        if last or not isinstance(self._network, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._network.no_sync()

    def add(self) -> None:
        pass  # Autograd has added the gradients to `.grad`.

    def finish(self, num_micro_batches: int) -> None:
        pass  # DDP has averaged over the ranks.


def distribute(network: nn.Module, train: Train, world: World) -> nn.Module:
    """Return DDP around the network, or the network itself where DDP would have nothing to sum."""
    if world.world_size == 1:
        return network
    if train.sync_batch_norm:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # It converts in place: parameters keep their names.
    if train.gradient_sums == "fp64":
        return network  # ExactSums sums in place of DDP.
    return DistributedDataParallel(
        network,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # RunningStatistics averages the buffers; DDP would overwrite them with rank 0's.
        **_KEEP_BUFFERS,
        # static_graph stays off: it only saves a search for unused parameters, which is off by default, and with
        # no_sync() it silently stops summing gradients (pytorch/pytorch#187732).
    )
