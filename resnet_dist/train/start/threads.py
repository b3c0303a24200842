"""The CPU threads that a rank computes with: as many as the work of a step feeds.

At every layer all threads wait for the slowest one. In a small net that wait takes longer than the computation that it
saves, and many times as long where the machine does anything else. The choice follows from the recipe alone, because the
curve depends on it in its last bits: measured speeds would draw another curve each time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resnet_dist.config import Recipe
from resnet_dist.model import build_model

# Multiplications in a forward pass through one layer that keep one more thread busy: see docs/performance.md.
WORK_PER_THREAD = 50e6


def choose_threads(recipe: Recipe, world_size: int, cpus: int) -> int:
    """Return the number of threads, at most `cpus`, for a rank of `world_size` that trains on its CPUs."""
    data = recipe.data
    # The number of classes changes the last of many layers alone.
    model = build_model(**recipe.model.options(), in_channels=data.channels, num_classes=10, seed=0)
    batch = data.micro_batch_size or max(1, data.global_batch_size // world_size)
    work = work_per_layer(model, channels=data.channels, size=data.image_size, batch=batch)
    return max(1, min(cpus, int(work / WORK_PER_THREAD)))


def work_per_layer(model: nn.Module, *, channels: int, size: int, batch: int) -> float:
    """Return the multiplications of a forward pass, as a mean over the layers that multiply by weights.

    model: on the CPU, and the caller's to give away: hooks stay in it, and it is left in evaluation. channels, size: of the
    images, size in pixels; batch: the number of images.
    """
    works: list[int] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        works.append(output.numel() * layer.weight[0].numel())  # type: ignore[operator, index, union-attr]

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    # One image, really computed: a forward pass on the meta device imports torch's compiler, which takes longer. Evaluation:
    # in training, batch norm refuses a single image of which one pixel is left.
    with torch.no_grad():
        model.eval()(torch.zeros(1, channels, size, size))
    return batch * sum(works) / len(works)
