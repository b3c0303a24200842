"""One optimizer step: micro-batches forward and backward, gradients averaged over the ranks, an update.

Shapes: B samples of a step on this rank, in U micro-batches of M samples; a step is global_batch_size = B · world_size
samples. C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from resnet_dist.config import Recipe, Train
from resnet_dist.data.batches.loader import Batch
from resnet_dist.data.images.augment import normalize
from resnet_dist.data.images.mix import mix
from resnet_dist.train.device import autocast
from resnet_dist.train.optim.build import set_learning_rate
from resnet_dist.train.optim.schedule import learning_rate, whitening_rate
from resnet_dist.train.plan import Plan, due
from resnet_dist.train.state.train_state import TrainState
from resnet_dist.train.step.batch_norm import RunningStatistics
from resnet_dist.train.step.block_drops import block_scales
from resnet_dist.train.step.exact_sums import ExactSums
from resnet_dist.train.step.gradient_norms import GradientNorms
from resnet_dist.train.step.gradient_sums import DdpSums, GradientSums, distribute
from resnet_dist.train.step.loss import sample_losses
from resnet_dist.train.watch.progress import Progress
from resnet_dist.world import World

# Calls a function at the end of the backward pass that runs now. torch 2.15 gave it a public name.
_engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
queue_callback: Any = getattr(torch.autograd.graph, "queue_callback", None) or _engine.queue_callback


class TrainStep:
    """One optimizer update: forward and backward per micro-batch, gradients averaged over ranks during the last.

    It does not wait for a GPU, because losses stay tensors. The exceptions are lamb, lars and muon in fp16, where the
    host asks whether gradients overflowed.
    """

    def __init__(
        self, state: TrainState, recipe: Recipe, plan: Plan, world: World, progress: Progress | None = None
    ) -> None:
        self.state, self.recipe, self.plan = state, recipe, plan
        self.rank, self.world_size = world.rank, world.world_size
        self.progress = progress or Progress()
        network = distribute(LossModel(state.model, recipe.train, world.device), recipe.train, world)
        exact = recipe.train.gradient_sums == "fp64"
        self.gradient_sums: GradientSums = ExactSums(state.model, world) if exact else DdpSums(network)
        self.network = compiled(network, recipe.train)
        self.statistics = RunningStatistics(state.model, world, compiled=recipe.train.compile != "none")
        self.gradient_norms = GradientNorms(state.model) if recipe.train.log_gradient_norms else None
        # A CUDA graph leaves gradients in memory that its next replay overwrites: accumulate them in our own memory.
        self.keeps_gradients = recipe.train.compile in ("reduce-overhead", "max-autotune")
        if self.keeps_gradients:
            for parameter in state.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def __call__(self, batch: Batch) -> None:
        """Train on this rank's batch of step `state.step`; the loop increases `state.step` afterwards."""
        state, schedule = self.state, self.recipe.schedule
        rate = learning_rate(
            state.step,
            schedule,
            peak=self.recipe.optim.lr,
            total_steps=self.plan.total,
            warmup_steps=self.plan.warmup,
            milestones=self.plan.milestones,
        )
        of_whitening = whitening_rate(
            state.step, rate, schedule, peak=self.recipe.optim.lr, steps=self.plan.whitening
        )
        set_learning_rate(state.optimizer, rate, of_whitening)
        times = state.meter.times
        times.begin(batch.wait_seconds)
        sums_U3 = self.accumulate_gradients(batch)
        self.statistics.finish_average()
        times.synced()
        if self.gradient_norms is not None and due(state.step + 1, self.plan.log, self.plan.total):
            self.gradient_norms.measure(state.scaler.get_scale())
        self.update_weights()
        if state.ema is not None and (state.step + 1) % self.plan.ema == 0:
            done = state.step + 1
            state.ema.update(done // self.plan.ema, done / self.plan.total)
        times.end()
        state.meter.add(sums_U3, samples=len(batch.ids_B), bad=batch.bad, wait_seconds=batch.wait_seconds)
        state.metrics["train/lr"] = rate

    def accumulate_gradients(self, batch: Batch) -> Tensor:
        """Leave the gradients of the global batch's mean loss in `.grad`; return (U, 3) sums of loss, hits, weights."""
        rank_samples = len(batch.ids_B)
        size = self.recipe.data.micro_batch_size or rank_samples
        count = rank_samples // size
        sums_U3 = torch.zeros(count, 3, dtype=torch.float64, device=batch.weights_B.device)
        for number in range(count):
            inputs = self.inputs_of(batch, number, size)
            last = number == count - 1
            self.statistics.begin_micro_batch(number, count)
            self.progress.at("in the forward pass")
            with self.gradient_sums.micro_batch(last=last):
                loss, sums_3 = self.network(*inputs)
                if last:
                    self.statistics.begin_average()
                    self.time_backward(loss)
                self.progress.at("in the backward pass")
                if number == 0:
                    # Free the old gradients only now: the backward pass then reuses their memory, which saves 4 % of
                    # a step on a CPU. The forward pass has less memory, which matters only on a full device.
                    self.state.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
                self.state.scaler.scale(loss / self.gradient_sums.divisor(rank_samples, size)).backward()
            self.gradient_sums.add()
            sums_U3[number] = sums_3  # a copy: the next replay of a CUDA graph overwrites its outputs
        if not self.gradient_sums.waits_in_backward:
            self.state.meter.times.computed()
        self.gradient_sums.finish(count * self.world_size)
        return sums_U3

    def time_backward(self, loss: Tensor) -> None:
        """Mark the end of this rank's own backward pass, where DDP begins to wait for the other ranks.

        DDP queues the callback that waits when its last gradient is there; this one is queued when the first is.
        """
        computed = self.state.meter.times.computed
        loss.register_hook(lambda gradient: queue_callback(computed))

    def inputs_of(self, batch: Batch, number: int, size: int) -> tuple[Tensor | None, ...]:
        """Return the arguments of the network for micro-batch `number` of this rank's batch: `size` samples."""
        rank_samples = len(batch.ids_B)
        rows = slice(number * size, (number + 1) * size)
        mixed = mix(
            normalize(batch.images_BSSC[rows], self.recipe.data),
            self.recipe.data,
            seed=self.recipe.seed,
            step=self.state.step,
            micro_batch=self.rank * (rank_samples // size) + number,
        )
        labels_M, weights_M = batch.labels_B[rows], batch.weights_B[rows]
        first = self.rank * rank_samples + rows.start  # the place in the global batch
        scales = block_scales(
            self.state.model,
            seed=self.recipe.seed,
            step=self.state.step,
            places=range(first, first + len(labels_M)),
            device=labels_M.device,
        )
        return mixed.images_MCHW, labels_M, weights_M, self.share_tensor(mixed.share), *scales

    def share_tensor(self, share: float) -> Tensor | None:
        """Return `share` as a tensor: compiled code would hold a number as a constant. None in a recipe without mixing."""
        data = self.recipe.data
        if not (data.mixup or data.cutmix):
            return None
        # Fill it on the device: a copy to the device would make the host wait. float64 is what Python calculates in.
        return torch.full((), share, dtype=torch.float64, device=self.state.meter.sums.device)

    def update_weights(self) -> None:
        """Clip and apply the gradients. In fp16 the scaler skips an update whose gradients overflowed."""
        optimizer, scaler, clip_norm = self.state.optimizer, self.state.scaler, self.recipe.optim.clip_norm
        if clip_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.state.model.parameters(), clip_norm)
        scaler.step(optimizer)
        scaler.update()


class LossModel(nn.Module):
    """The forward pass and the loss as one module, so that they compile to one graph."""

    def __init__(self, model: nn.Module, train: Train, device: torch.device) -> None:
        super().__init__()
        self.model, self.options = model, train
        self.autocast = autocast(train.precision, device)

    def forward(
        self,
        images_MCHW: Tensor,
        labels_M: Tensor,
        weights_M: Tensor,
        share: Tensor | None,
        *scales: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses, and the float64 sums (3,) of loss, hits and weights, without gradient."""
        with self.autocast:
            logits_MK = self.model(images_MCHW, *scales)
        losses = sample_losses(logits_MK.float(), labels_M, weights_M, share, self.options)
        hits = (logits_MK.detach().argmax(dim=1) == labels_M).float() * weights_M
        sums = torch.stack([losses.detach(), hits, weights_M]).sum(dim=1, dtype=torch.float64)
        return losses.sum(), sums


def compiled(module: nn.Module, train: Train) -> nn.Module:
    """Return the module, compiled where the recipe asks for it; `module` itself keeps the names of its parameters."""
    if train.compile == "none":
        return module
    # dynamic=False: with the default, a second image size would compile slower code for all sizes.
    return cast(nn.Module, torch.compile(module, mode=train.compile, dynamic=False))
