"""Stochastic depth: in training, skip the residual of random blocks (Huang et al. 2016, arXiv 1603.09382).

    output = shortcut(x) + F(x) · scale        scale = 0 with probability 1 - p, 1 / p with probability p

A dropped block is its shortcut, so every step trains a shallower net, which regularises and shortens the way
of the gradient. The expectation of the scale is 1: evaluation uses every block as it is. Deeper blocks are
dropped more often, by the paper's linear rule: block l of L (from 1) is kept with p = 1 - rate · l / L.

The model draws nothing. Whoever trains it passes the scales in, made from draws that belong to (seed, step,
sample, block), so a step is the same after a restart and on any number of ranks. They are an ordinary tensor
argument: nothing to trace around for torch.compile, and no state of a generator to save.

Shapes: N samples, L blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_probabilities(rate: float, blocks: int) -> Tensor:
    """(L,) probabilities of keeping each block: falling from nearly 1 to 1 - rate."""
    return 1 - rate * torch.arange(1, blocks + 1) / blocks


def residual_scales(draws_NL: Tensor, rate: float) -> Tensor:
    """Uniform draws from [0, 1) → factors of the residuals, float32, (N, L): each sample drops its own blocks.

    The paper drops a block for a whole mini-batch, which saves its arithmetic; per sample is what later
    recipes use (arXiv 2110.00476), and needs no branch that a GPU would wait for.
    """
    keep_L = keep_probabilities(rate, draws_NL.shape[1]).to(draws_NL.device)
    return torch.where(draws_NL < keep_L, 1 / keep_L, 0.0).float()
