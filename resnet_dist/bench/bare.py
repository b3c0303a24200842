"""The baseline of `bench step`: a training loop as one writes it by hand. It uses nothing of train/.

It has no schedule, no metrics but the loss, no checkpoints, no tracker, no averaged batch norm, no bad samples.

With several ranks, DDP's default broadcasts rank 0's running statistics of batch norm before every forward pass, and
waits for them. Our loop switches that off, and sums the ranks' statistics while the device works. Both make the ranks
agree, so by default the baseline keeps DDP's way. With `sync_buffers=False` each rank of the bare loop keeps its own
statistics, at no cost: that is less work than ours does, and so the stricter comparison.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.config import Recipe
from resnet_dist.model import build_model

# Find the name that this torch has: version 2.15 renamed the argument, and warns about the old name.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
Labelled = tuple[Tensor, Tensor]  # uint8 images (B, S, S, C), labels (B)


class BareLoop:
    """A model in plain PyTorch with the settings of `recipe`, under DDP where a process group exists."""

    def __init__(
        self, recipe: Recipe, num_classes: int, device: torch.device, *, sync_buffers: bool = True
    ) -> None:
        model = build_model(
            recipe.model.name, in_channels=recipe.data.channels, num_classes=num_classes, seed=recipe.seed
        )
        model = model.to(device).to(memory_format=torch.channels_last)
        weights = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": weights, "weight_decay": recipe.optim.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(
            groups,
            lr=recipe.optim.lr,
            momentum=recipe.optim.momentum,
            nesterov=recipe.optim.nesterov,
            fused=True,
        )
        self.model: nn.Module = model
        if dist.is_initialized():
            on_gpu = device.type == "cuda"
            buffers: dict[str, Any] = {SYNC_BUFFERS: sync_buffers}
            self.model = DistributedDataParallel(
                model,
                device_ids=[device] if on_gpu else None,
                gradient_as_bucket_view=True,
                **buffers,
            )
        mode = recipe.train.compile
        self.forward = self._loss if mode == "none" else torch.compile(self._loss, mode=mode, dynamic=False)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16")
        self.mean = torch.tensor(recipe.data.mean, device=device).mul(255)[:, None, None]
        self.scale = torch.tensor(recipe.data.std, device=device).mul(255).reciprocal()[:, None, None]

    def _loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(pixels), labels)

    def run(self, batches: Sequence[Labelled]) -> tuple[float, list[float]]:
        """Take one step with each batch. Return the seconds in all, and the loss of each step on this rank."""
        losses = []
        start = time.perf_counter()
        for images, labels in batches:
            pixels = images.permute(0, 3, 1, 2).float().sub_(self.mean).mul_(self.scale)
            with self.autocast:
                loss = self.forward(pixels, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            # Clone the loss: the next replay of a CUDA graph overwrites its output.
            losses.append(loss.detach().clone())
        values = torch.stack(losses).tolist()  # This waits for the device.
        return time.perf_counter() - start, values
