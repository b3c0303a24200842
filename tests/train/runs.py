"""Run short trainings on one rank, and compare the checkpoints that they leave."""

from __future__ import annotations

from pathlib import Path

import torch

from resnet_dist.config import Recipe
from resnet_dist.train import loop
from resnet_dist.train.checkpoint.folder import read_checkpoint
from resnet_dist.train.step.gradient_norms import GRADIENT_NORMS
from resnet_dist.train.tracker import NullTracker
from resnet_dist.world import World
from tests.paths import list_checkpoints


class Recorder(NullTracker):
    """A Tracker that keeps everything except speeds and the use of machines; it raises at step `dies_at`, to end a run as a kill would."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.metrics: dict[tuple[str, int], float] = {}  # by name and step
        self.norms: dict[int, dict[str, float]] = {}  # by step, then by layer
        self.curve: list[float] = []  # losses and gradient norms, in order
        self.notes: list[str] = []
        self.dies_at = dies_at

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.metrics |= {
            (name, step): value
            for name, value in metrics.items()
            if not name.startswith(("perf/", "system/"))
        }
        self.curve += [value for name, value in metrics.items() if name in ("train/loss", "eval/loss")]
        if self.dies_at is not None and step >= self.dies_at:
            raise KeyboardInterrupt

    def log_layers(self, name: str, values: dict[str, float], step: int) -> None:
        assert name == GRADIENT_NORMS
        self.norms[step] = values
        self.curve += values.values()

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(recipe: Recipe, folder: Path, stop_after: int = 0) -> dict[tuple[str, int], float]:
    """Train on one rank, to the end or for `stop_after` steps; return the metrics by name and step."""
    recorder, calls = Recorder(), iter(range(1, 10**6))
    loop.train(recipe, folder, World.single(), recorder, lambda: next(calls) == stop_after)
    return recorder.metrics


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the newest checkpoint by 'file/name'."""
    tensors, _ = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    # Clone them: safetensors maps the file, and a test may damage it.
    return {
        f"{file}/{name}": value.clone() for file, group in tensors.items() for name, value in group.items()
    }


def assert_same(folder: Path, other: Path) -> None:
    """Assert that both newest checkpoints hold the same tensors, bit for bit."""
    ours, theirs = final_tensors(folder), final_tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
