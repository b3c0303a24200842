"""What a run is at a step: everything that a checkpoint must hold, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resnet_dist.train.meter import Meter
from resnet_dist.world import World


@dataclass(frozen=True)
class Best:
    """The best value so far of the metric that `train.best_metric` names, and the step that had it."""

    metric: str
    value: float
    step: int

    def is_beaten_by(self, value: float) -> bool:
        return value < self.value if self.metric.endswith("loss") else value > self.value


@dataclass
class TrainState:
    """The same on all ranks after every step, but for the sums in `meter` (see Meter.gather)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    meter: Meter
    step: int = 0
    bad_samples: int = 0  # of all ranks, up to the last log line
    evaluation_pending: bool = False  # of this step: a stop may come before it or in its middle
    best: Best | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # the newest of every name

    def finished(self, total_steps: int) -> bool:
        return self.step >= total_steps and not self.evaluation_pending

    def evaluated(self, metrics: dict[str, float], best_metric: str | None) -> None:
        """Take in what the evaluation of this step gave."""
        self.metrics |= metrics
        self.evaluation_pending = False
        if best_metric is None:
            return
        value = metrics[best_metric]
        if self.best is None or self.best.metric != best_metric or self.best.is_beaten_by(value):
            self.best = Best(best_metric, value, self.step)

    def is_best(self) -> bool:
        """Whether this very step is the best so far."""
        return self.best is not None and self.best.step == self.step

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """By file of a checkpoint, then by name."""
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": moments,
            "meter": {"sums": self.meter.table()},
        }

    def scalars(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "bad_samples": self.bad_samples,
            "evaluation_pending": self.evaluation_pending,
            "best": asdict(self.best) if self.best else None,
            "metrics": dict(self.metrics),
        }

    def load(self, tensors: dict[str, dict[str, Tensor]], scalars: dict[str, Any], world: World) -> None:
        """Take over what `tensors()` and `scalars()` gave. Raises RuntimeError where the shapes differ."""
        self.model.load_state_dict(tensors["model"])
        parameters = dict(self.model.named_parameters())
        for full_name, value in tensors["optimizer"].items():
            name, _, key = full_name.rpartition("/")
            parameter = parameters[name]
            if value.shape == parameter.shape:  # a moment: as channels-last in memory as its parameter
                value = torch.empty_like(parameter).copy_(value)
            self.optimizer.state[parameter][key] = value.detach().to(parameter.device)
        self.meter.load(tensors["meter"]["sums"], world)
        self.step, self.bad_samples = scalars["step"], scalars["bad_samples"]
        self.evaluation_pending = scalars["evaluation_pending"]
        self.best = Best(**scalars["best"]) if scalars["best"] else None
        self.metrics = dict(scalars["metrics"])
