"""The blocks that a training step drops: stochastic depth, drawn from identity.

A draw depends on (seed, step, place in the global batch, block) alone: it is the same after a restart, on any number
of ranks and for any size of micro-batches.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from resnet_dist.data.images.pixels import to_device
from resnet_dist.model import ResNet, residual_scales
from resnet_dist.order.philox import Purpose, uniform, words_of

WORDS_PER_COUNTER = 4  # random words that Philox makes at once


def block_scales(
    model: nn.Module, *, seed: int, step: int, places: range, device: torch.device
) -> tuple[Tensor, ...]:
    """Return the extra arguments of the forward pass for the samples at `places` of the global batch.

    They are one tensor (N samples, L blocks) of `residual_scales`, or none for a model without stochastic depth.
    """
    if not isinstance(model, ResNet) or model.stochastic_depth == 0:
        return ()
    words = words_of(
        np.arange(places.start, places.stop),
        Purpose.DEPTH,
        seed=seed,
        epoch=step & 0xFFFFFFFF,
        blocks=-(-model.num_blocks // WORDS_PER_COUNTER),
    )
    draws_NL = torch.from_numpy(uniform(words)[:, : model.num_blocks])
    scales_NL = residual_scales(draws_NL, model.stochastic_depth)
    return (to_device(scales_NL.numpy(), device),)
