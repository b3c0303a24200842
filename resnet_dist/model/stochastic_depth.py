"""Stochastic depth: training skips the F(x) of random blocks (Huang et al. 2016, arXiv 1603.09382).

    output = shortcut(x) + F(x) · scale        scale = 1 / p with probability p, else 0

A dropped block is its shortcut alone, so every step trains a shallower net, which regularises and shortens
the path of the gradient. The expectation of the scale is 1, so evaluation uses every block unchanged. Later
blocks are dropped more often, by the paper's linear rule: block l of L (from 1) is kept with probability
p = 1 - rate · l / L.

The model itself draws nothing: the training step passes the scales in, made from draws that depend only on
(seed, step, sample, block). A step is therefore the same after a restart and on any number of ranks, and
torch.compile sees an ordinary tensor argument instead of the state of a generator.

Shapes: N samples, L blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_probabilities(rate: float, num_blocks: int) -> Tensor:
    """Return (L,) probabilities of keeping each block, which fall linearly to 1 - rate at the last one."""
    return 1 - rate * torch.arange(1, num_blocks + 1) / num_blocks


def residual_scales(draws_NL: Tensor, rate: float) -> Tensor:
    """Return float32 factors (N, L) of the residuals for uniform draws (N, L) from [0, 1).

    Every sample drops its own blocks. The paper drops a block for a whole mini-batch, which saves its
    arithmetic; later recipes drop per sample (arXiv 2110.00476), which needs no branch that waits for the
    GPU.
    """
    keep_L = keep_probabilities(rate, draws_NL.shape[1]).to(draws_NL.device)
    return torch.where(draws_NL < keep_L, 1 / keep_L, 0.0).float()
