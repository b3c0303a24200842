"""The learning rate of a step: a pure function, so a restart has no position to lose."""

from __future__ import annotations

import math
from collections.abc import Sequence

from resnet_dist.config import Schedule


def learning_rate(
    step: int,
    schedule: Schedule,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    milestones: Sequence[int] = (),
) -> float:
    """Return the rate of the update that follows `step` completed ones. `milestones` are the schedule's, in steps."""
    if step < warmup_steps:
        return _warmup(step if schedule.warmup_at_start else step + 1, schedule, peak, warmup_steps)
    low = peak * schedule.floor
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)  # from 0 to just below 1
    if schedule.decay == "cosine":
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.decay == "polynomial":
        return low + (peak - low) * math.pow(1 - progress, schedule.power)
    if schedule.decay == "step":
        return peak * schedule.gamma ** sum(step >= milestone for milestone in milestones)
    return peak


def whitening_rate(step: int, rate: float, schedule: Schedule, *, peak: float, steps: int | None) -> float:
    """Return the rate of a whitening layer's bias, where that of the weights is `rate`: 0 once it is frozen.

    steps: those for which it trains; None: all.
    """
    if steps is None:
        return rate
    if step >= steps:
        return 0.0
    return peak * (1 - step / steps) if schedule.whitening_bias_decay == "linear" else rate


def _warmup(part: int, schedule: Schedule, peak: float, warmup_steps: int) -> float:
    """Return the rate after `part` of the parts by which the warm-up rises from its start to `peak`."""
    start = peak * schedule.warmup_start
    if schedule.warmup_shape == "constant":
        return start
    if schedule.warmup_shape == "cosine":
        return start + (peak - start) * 0.5 * (1 - math.cos(math.pi * part / warmup_steps))
    return start + (peak - start) * part / warmup_steps
