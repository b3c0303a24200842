"""The evaluation of one checkpoint after the other, in a process beside the ranks."""

from __future__ import annotations

import math

import torch

from resnet_dist.config import Recipe
from resnet_dist.data.shards.index import read_index
from resnet_dist.errors import TrainingError
from resnet_dist.train.checkpoint.load import load_model
from resnet_dist.train.device import set_arithmetic
from resnet_dist.train.evaluate import evaluate, evaluation_loader
from resnet_dist.train.plan import Plan, order_of
from resnet_dist.train.predictions import MAX_SAMPLES, PredictionLog
from resnet_dist.world import World


class CheckpointEvaluator:
    """Evaluates checkpoints as the ranks would: the same data, precision and metrics, each sample once."""

    def __init__(self, recipe: Recipe, cpus: int, *, gpu: bool) -> None:
        torch.set_num_threads(cpus)
        self._recipe, self._world = recipe, World.single(gpu=gpu)
        set_arithmetic(recipe.train, self._world.device)
        self._loader = evaluation_loader(read_index(recipe.data.eval), recipe.data, self._world)
        # Without order: only the number of steps counts here.
        self._total = Plan.of(recipe, order_of(recipe, read_index(recipe.data.train))).total

    def evaluate(self, location: str) -> tuple[dict[str, float], bytes | None]:
        """Return metrics and predictions of a checkpoint. Raises TrainingError where they would end a training."""
        trained = load_model(location, self._world.device, allow_commands=self._recipe.data.allow_commands)
        log = PredictionLog() if self._wants_figures(trained.step) else None
        precision = self._recipe.train.precision
        if precision == "fp16" and self._world.device.type != "cuda":
            precision = "fp32"
        metrics = evaluate(trained.model, self._loader, self._world, predictions=log, precision=precision)
        self._check(metrics)
        return metrics, None if log is None else log.gather(self._world).to_bytes()

    def _wants_figures(self, step: int) -> bool:
        figures = self._recipe.train.figures
        is_asked = figures == "evaluations" or (figures == "end" and step >= self._total)
        return is_asked and self._loader.index.num_samples <= MAX_SAMPLES

    def _check(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise TrainingError(f"{name} is {value}")
        bad, limit = metrics["eval/bad_samples"], self._recipe.data.max_bad_fraction
        if bad / (bad + metrics["eval/samples"]) > limit:
            raise TrainingError(
                f"{bad:.0f} samples could not be decoded, more than data.max_bad_fraction={limit} allows"
            )
