"""The state of a run at a step: everything that a checkpoint must hold, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from resnet_dist.config import Train
from resnet_dist.train.state.ema import Ema
from resnet_dist.train.state.meter import Meter
from resnet_dist.world import World


@dataclass(frozen=True)
class Best:
    """The best value so far of the metric that `train.best_metric` names, and the step that had it."""

    metric: str
    value: float
    step: int

    def is_beaten_by(self, value: float) -> bool:
        return value < self.value if self.metric.endswith("loss") else value > self.value

    @classmethod
    def after(cls, before: Best | None, metric: str, value: float, step: int) -> Best:
        """Return the best once `step` has this value; a best of another metric does not count."""
        if before is None or before.metric != metric or before.is_beaten_by(value):
            return cls(metric, value, step)
        return before


@dataclass
class TrainState:
    """The state of a run: the same on all ranks after every step, except the sums in `meter` (see Meter.gather)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    meter: Meter
    ema: Ema | None = None
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    step: int = 0
    bad_samples: int = 0  # over all ranks, up to the last log line
    evaluation_pending: bool = False  # for this step: the run may stop before or during its evaluation
    best: Best | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # the newest value by name

    def __post_init__(self) -> None:
        # The keys of a group now are settings from the recipe; keys that steps add, such as LAMB's count, are state.
        self._settings = [set(group) for group in self.optimizer.param_groups]

    @property
    def predictor(self) -> nn.Module:
        """The model to evaluate and to export: the average where there is one."""
        return self.model if self.ema is None else self.ema.model

    def finished(self, total_steps: int) -> bool:
        return self.step >= total_steps and not self.evaluation_pending

    def evaluated(self, metrics: dict[str, float], best_metric: str | None) -> None:
        """Record the metrics of this step's evaluation, and the best value so far."""
        self.metrics |= metrics
        self.evaluation_pending = False
        if best_metric is not None:
            self.best = Best.after(self.best, best_metric, metrics[best_metric], self.step)

    def is_best(self) -> bool:
        """Report whether this step is the best so far."""
        return self.best is not None and self.best.step == self.step

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint, by file, then by name.

        model.safetensors holds the model that predicts, so that its readers need not know about averages. Where there
        is an average, the weights under training are in raw.safetensors.
        """
        raw = {} if self.ema is None else {"raw": dict(self.model.state_dict())}
        moments = self._optimizer_state()
        return {
            "model": dict(self.predictor.state_dict()),
            **raw,
            "optimizer": {name: value for name, value in moments.items() if isinstance(value, Tensor)},
            "meter": {"sums": self.meter.table()},
        }

    def scalars(self) -> dict[str, Any]:
        """Return the rest of a checkpoint: the values that are not tensors, ready for JSON."""
        moments = self._optimizer_state()
        return {
            "step": self.step,
            "bad_samples": self.bad_samples,
            "evaluation_pending": self.evaluation_pending,
            "best": asdict(self.best) if self.best else None,
            "metrics": dict(self.metrics),
            "optimizer": {name: value for name, value in moments.items() if not isinstance(value, Tensor)},
            "scaler": self.scaler.state_dict(),
        }

    def load(self, tensors: dict[str, dict[str, Tensor]], scalars: dict[str, Any], world: World) -> None:
        """Restore what `tensors()` and `scalars()` returned. Raises RuntimeError where the shapes differ."""
        self.model.load_state_dict(tensors.get("raw", tensors["model"]))
        # An average that is new in this attempt begins at the checkpoint's weights.
        if self.ema is not None:
            self.ema.model.load_state_dict(tensors["model"])
        self._load_optimizer_state({**tensors["optimizer"], **scalars.get("optimizer", {})})
        if scalars.get("scaler"):
            self.scaler.load_state_dict(scalars["scaler"])
        self.meter.load(tensors["meter"]["sums"], world)
        self.step, self.bad_samples = scalars["step"], scalars["bad_samples"]
        # Versions before 0.3.0 wrote neither evaluation_pending nor best.
        self.evaluation_pending = scalars.get("evaluation_pending", False)
        self.best = Best(**scalars["best"]) if scalars.get("best") else None
        self.metrics = dict(scalars["metrics"])

    def _optimizer_state(self) -> dict[str, Any]:
        """Return what steps have left in the optimizer, by 'fc.weight/momentum_buffer' or 'groups.0/step'."""
        state = {
            f"{name}/{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        for number, (group, settings) in enumerate(
            zip(self.optimizer.param_groups, self._settings, strict=True)
        ):
            state |= {f"groups.{number}/{key}": group[key] for key in group if key not in settings}
        return state

    def _load_optimizer_state(self, state: dict[str, Any]) -> None:
        parameters = dict(self.model.named_parameters())
        groups = {f"groups.{number}": group for number, group in enumerate(self.optimizer.param_groups)}
        for full_name, value in state.items():
            name, _, key = full_name.rpartition("/")
            if name in groups:
                groups[name][key] = value
                continue
            parameter = parameters[name]
            if isinstance(value, Tensor):
                if value.shape == parameter.shape:  # a moment: give it the memory layout of its parameter
                    value = torch.empty_like(parameter).copy_(value)
                value = value.detach().to(parameter.device)
            self.optimizer.state[parameter][key] = value


def build_scaler(train: Train, device: torch.device) -> GradScaler:
    """Return the scaler that keeps small fp16 gradients from rounding to zero; it is disabled in other precisions."""
    return GradScaler(device.type, enabled=train.precision == "fp16")
