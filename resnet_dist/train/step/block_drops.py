"""Which blocks a training step drops: stochastic depth, drawn from identity.

The draws belong to (seed, step, place in the global batch, block): the same after a restart, on any number of
ranks and for any size of micro-batches.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from resnet_dist.model import ResNet, residual_scales
from resnet_dist.order.philox import Purpose, uniform, words_of

WORDS_PER_DRAW = 4


def block_scales(
    model: nn.Module, *, seed: int, step: int, places: range, device: torch.device
) -> tuple[Tensor, ...]:
    """What the forward pass of the samples at `places` of the global batch takes besides their images.

    Nothing, or the one tensor (N, L) of `residual_scales` where the model has stochastic depth.
    """
    if not isinstance(model, ResNet) or model.stochastic_depth == 0:
        return ()
    words = words_of(
        np.arange(places.start, places.stop),
        Purpose.DEPTH,
        seed=seed,
        epoch=step & 0xFFFFFFFF,
        blocks=-(-model.num_blocks // WORDS_PER_DRAW),
    )
    draws_NL = torch.from_numpy(uniform(words)[:, : model.num_blocks])
    return (residual_scales(draws_NL, model.stochastic_depth).to(device, non_blocking=True),)
