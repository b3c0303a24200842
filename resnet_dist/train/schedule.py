"""The learning rate of a step: pure, so a restart has no position to lose."""

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    decay: Literal["cosine", "constant"],
) -> float:
    """Rate for the update that follows `step` completed ones.

    Rises linearly from peak / warmup_steps to `peak` (arXiv 1706.02677), then falls to zero along half a
    cosine (arXiv 1608.03983) or stays.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if decay == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
