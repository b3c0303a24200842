"""Optimizers and their parameter groups."""

import torch
from torch import nn

from resnet_dist.config import Optim


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """SGD over two groups: weights of convolutions and linear layers decay, norms and biases do not.

    Decay on a batch norm's scale or on a bias only shrinks the output (arXiv 1706.02677, section 5.3).
    The rate is set before every step, from the schedule.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
