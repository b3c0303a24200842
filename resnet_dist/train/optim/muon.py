"""Muon for convolution weights, SGD for all others, in one optimizer.

Muon (https://kellerjordan.github.io/posts/muon): the update of a matrix is its momentum, with all singular
values brought to about one. A convolution weight (O, I, h, w) is the matrix (O, h·w·I) of a linear layer that is
applied to patches. torch.optim.Muon accepts only matrices, and iterates on them one by one; here all weights of one
shape go through the iteration together. A net has few shapes, and for small matrices a GPU spends its time on kernel
launches, not on arithmetic.

Shapes: N weights of one shape, O and I output and input channels, h and w the kernel's height and width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from resnet_dist.train.optim.undecorated import Undecorated

# The quintic a·x + b·x³ + c·x⁵ with the steepest slope at zero that keeps singular values between about 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5  # iterations
MIN_NORM = 1e-7  # avoids a division by zero

Group = dict[str, Any]


class Muon(Undecorated):
    """Muon for groups with `orthogonalize=True`, which hold convolution weights (O, I, h, w); SGD for all others.

    Decay follows torch.optim.Muon and torch.optim.SGD: decoupled from the gradient in Muon's groups (weights shrink
    by lr · weight_decay), added to the gradient in the others. Groups with `normalize=True` bring each weight to the norm
    √O before its update, as airbench94's version with Muon does. State: one `momentum_buffer` per parameter.
    """

    def __init__(
        self,
        groups: list[Group],
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float = 0.0,
        ns_steps: int = NS_STEPS,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        self._ns_steps = ns_steps  # Not in the groups, whose keys a checkpoint may hold.
        super().__init__(groups, {**defaults, "orthogonalize": False, "normalize": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads: list[Tensor] = [p.grad for p in params]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            if params and group["orthogonalize"]:
                _muon(params, grads, buffers, group, self._ns_steps)
            elif params:
                _sgd(params, grads, buffers, group)


def _muon(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: Group, ns_steps: int
) -> None:
    lr, momentum = group["lr"], group["momentum"]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    updates = torch._foreach_lerp(grads, buffers, momentum) if group["nesterov"] else tuple(buffers)
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for number, p in enumerate(params):
        by_shape[p.shape].append(number)
    if group["normalize"]:
        norms = torch._foreach_norm(params)
        torch._foreach_clamp_min_(norms, MIN_NORM)
        torch._foreach_div_(params, norms)
        torch._foreach_mul_(params, [math.sqrt(len(p)) for p in params])
    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    for numbers in by_shape.values():
        # Flatten in the order of channels-last memory: the iteration does not depend on the order of columns.
        stacked_NOhwI = torch.stack([updates[n].permute(0, 2, 3, 1) for n in numbers])
        matrices = orthogonalize(stacked_NOhwI.flatten(2), ns_steps)
        parts_NOIhw = matrices.reshape(stacked_NOhwI.shape).to(stacked_NOhwI.dtype).permute(0, 1, 4, 2, 3)
        # A tall matrix moves its outputs less than a wide one: raise its rate, so that both move them alike.
        rows, columns = matrices.shape[1:]
        rate = lr * math.sqrt(max(1, rows / columns))
        torch._foreach_add_([params[n] for n in numbers], list(parts_NOIhw), alpha=-rate)


def _sgd(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: Group) -> None:
    slopes = torch._foreach_add(grads, params, alpha=group["weight_decay"])
    torch._foreach_mul_(buffers, group["momentum"])
    torch._foreach_add_(buffers, slopes)
    updates = torch._foreach_add(slopes, buffers, alpha=group["momentum"]) if group["nesterov"] else buffers
    torch._foreach_add_(params, updates, alpha=-group["lr"])


def orthogonalize(matrices: Tensor, ns_steps: int = NS_STEPS) -> Tensor:
    """Return (N, rows, columns) in bfloat16 with every singular value near one, by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    x: Tensor = matrices.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    if tall:  # transpose, so that the products below have the size of the shorter side
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=MIN_NORM)
    for _ in range(ns_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
