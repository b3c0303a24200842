"""Short runs on one rank, and what they leave behind."""

from __future__ import annotations

from pathlib import Path

import torch

from resnet_dist.config import Recipe
from resnet_dist.train import loop
from resnet_dist.train.checkpoint import list_checkpoints, read_checkpoint
from resnet_dist.world import World


class Metrics(loop.NullTracker):
    """By name and step, but for speeds."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, int], float] = {}

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.values |= {
            (name, step): value for name, value in metrics.items() if not name.startswith("perf/")
        }


def run(recipe: Recipe, folder: Path, stop_after: int = 0) -> dict[tuple[str, int], float]:
    """Train on one rank, to the end or for `stop_after` steps; returns the metrics by name and step."""
    metrics, calls = Metrics(), iter(range(1, 10**6))
    loop.train(recipe, folder, World.single(), metrics, lambda: next(calls) == stop_after)
    return metrics.values


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """'file/name' → tensor of the newest checkpoint."""
    tensors, _ = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    return {f"{file}/{name}": value for file, group in tensors.items() for name, value in group.items()}
