"""What a run is at a step: everything that a checkpoint must hold, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resnet_dist.train.meter import Meter


@dataclass
class TrainState:
    """The same on all ranks after every step, but for the sums in `meter` (see Meter.gather)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    meter: Meter
    step: int = 0
    bad_samples: int = 0  # of all ranks, up to the last log line
    metrics: dict[str, float] = field(default_factory=dict)  # the newest of every name

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
            "meter": {"sums": self.meter.sums},
        }

    def scalars(self) -> dict[str, Any]:
        return {"step": self.step, "bad_samples": self.bad_samples, "metrics": self.metrics}

    def load(self, tensors: dict[str, dict[str, Tensor]], scalars: dict[str, Any], *, is_main: bool) -> None:
        """Take over what `tensors()` and `scalars()` gave. Raises RuntimeError where the shapes differ."""
        self.model.load_state_dict(tensors["model"])
        parameters = dict(self.model.named_parameters())
        for full_name, value in tensors["optimizer"].items():
            name, _, key = full_name.rpartition("/")
            parameter = parameters[name]
            if value.shape == parameter.shape:  # a moment: as channels-last in memory as its parameter
                value = torch.empty_like(parameter).copy_(value)
            self.optimizer.state[parameter][key] = value.detach().to(parameter.device)
        if is_main:  # sums of all ranks lie in the checkpoint once
            self.meter.sums.copy_(tensors["meter"]["sums"])
        self.step, self.bad_samples = scalars["step"], scalars["bad_samples"]
        self.metrics = dict(scalars["metrics"])
