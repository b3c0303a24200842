"""One optimizer step: micro-batches forward and backward, gradients averaged over the ranks, an update.

Shapes: B samples that this rank has of a step; a step is global_batch_size = B · world_size samples.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.config import Recipe
from resnet_dist.data.augment import normalize
from resnet_dist.data.loader import Batch
from resnet_dist.data.mix import Mixed, mix
from resnet_dist.train.batch_norm import RunningStatistics
from resnet_dist.train.optim import set_learning_rate
from resnet_dist.train.plan import Plan
from resnet_dist.train.schedule import learning_rate
from resnet_dist.train.state import TrainState
from resnet_dist.world import World

# torch 2.15 renamed the argument and warns of the old name.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers": False
}


class TrainStep:
    """One optimizer update: forward and backward per micro-batch, gradients averaged over ranks on the last."""

    def __init__(self, state: TrainState, recipe: Recipe, plan: Plan, world: World) -> None:
        self.state, self.recipe, self.plan, self.rank = state, recipe, plan, world.rank
        self.network = distribute(state.model, world)
        self.statistics = RunningStatistics(state.model, world)
        self.autocast = torch.autocast(
            world.device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"
        )

    def __call__(self, batch: Batch) -> None:
        state, optim, schedule = self.state, self.recipe.optim, self.recipe.schedule
        rate = learning_rate(
            state.step,
            peak=optim.lr,
            total_steps=self.plan.total,
            warmup_steps=self.plan.warmup,
            decay=schedule.decay,
        )
        set_learning_rate(state.optimizer, rate)
        sums = self.accumulate_gradients(batch)
        self.statistics.finish_average()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.meter.add(sums, samples=len(batch.ids_B), bad=batch.bad, wait_seconds=batch.wait_seconds)
        state.metrics["train/lr"] = rate

    def accumulate_gradients(self, batch: Batch) -> Tensor:
        """Gradients of the mean loss of the global batch, in `.grad`; returns sums of loss, hits and weights."""
        local_batch_size = len(batch.ids_B)
        micro_batch_size = self.recipe.data.micro_batch_size or local_batch_size
        count = local_batch_size // micro_batch_size
        sums = torch.zeros(3, dtype=torch.float64, device=batch.weights_B.device)
        for number in range(count):
            rows = slice(number * micro_batch_size, (number + 1) * micro_batch_size)
            mixed = mix(
                normalize(batch.images_BSSC[rows], self.recipe.data),
                self.recipe.data,
                seed=self.recipe.seed,
                step=self.state.step,
                micro_batch=self.rank * count + number,
            )
            labels, weights = batch.labels_B[rows], batch.weights_B[rows]
            self.statistics.begin_micro_batch(number, count)
            last = number == count - 1
            with synchronised_if(self.network, last=last):
                with self.autocast:
                    logits = self.network(mixed.images_MCHW)
                if last:
                    self.statistics.begin_average()
                losses = self.weighted_losses(logits.float(), labels, weights, mixed.share)
                # DDP averages over ranks: dividing by this rank's share makes it the mean over the global
                # batch. A bad sample has weight 0; not counting it in the divisor would cost a collective.
                (losses.sum() / local_batch_size).backward()
            hits = (logits.detach().argmax(dim=1) == labels).float() * weights
            sums += torch.stack([losses.detach(), hits, weights]).sum(dim=1, dtype=torch.float64)
        return sums

    def weighted_losses(self, logits: Tensor, labels: Tensor, weights: Tensor, share: float) -> Tensor:
        """Cross-entropy of every image; of a mixed one, that of both its labels in their shares."""
        smoothing = self.recipe.train.label_smoothing
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing) * weights
        if share == 1:
            return losses
        others = F.cross_entropy(
            logits, Mixed.partner(labels), reduction="none", label_smoothing=smoothing
        ) * Mixed.partner(weights)
        return share * losses + (1 - share) * others


def distribute(model: nn.Module, world: World) -> nn.Module:
    """DDP around the model, or the model itself where there is one rank."""
    if world.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # RunningStatistics averages the buffers: no rank's statistics are thrown away.
        **_KEEP_BUFFERS,
    )


def synchronised_if(network: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[None]:
    """Hold back DDP's all-reduce until the last micro-batch of a step."""
    if last or not isinstance(network, DistributedDataParallel):
        return contextlib.nullcontext()
    return network.no_sync()
