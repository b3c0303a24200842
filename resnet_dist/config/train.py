"""How it is trained: the optimizer, its schedule, and the lengths of a run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from resnet_dist.config.lengths import Length
from resnet_dist.config.part import Part


class Optim(Part):
    optimizer: Literal["sgd"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    """For the whole global batch. Scaling with it is written out in the recipe, never done behind it."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(default=1e-4, ge=0)
    """On convolution and linear weights; never on norms and biases."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "nesterov=True needs momentum greater than 0; set nesterov=false or momentum=0.9"
            )
        return self


class Schedule(Part):
    decay: Literal["cosine", "constant"] = "cosine"
    warmup: Length = "0 steps"


class Train(Part):
    length: Length
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the arithmetic in forward passes; weights stay fp32."""
    log_every: Length = "50 steps"
    eval_every: Length = "1 epochs"
    checkpoint_every: Length = "1 epochs"
    keep_checkpoints: int = Field(default=2, ge=1)
    log_gradient_norms: bool = False
    """Whether log steps also measure the gradient of every convolution: gradient_norms.json of the run."""
