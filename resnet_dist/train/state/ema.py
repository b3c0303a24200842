"""An exponential moving average of the weights, which often predicts better than the newest weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from resnet_dist.config import Train


class Ema:
    """A second model that follows the first: average = decay · average + (1 - decay) · weights.

    Running statistics of batch norm are averaged in the same way: the newest ones were taken with the newest weights,
    and do not fit the average of older ones. Counters are copied.

    An update depends on its number and its place in the run alone, so a restart from the tensors of `model` changes
    nothing. With `replaces`, the average is put in place of the weights too (lookahead, arXiv 1907.08610); what the
    optimizer remembers stays.
    """

    def __init__(
        self, model: nn.Module, *, decay: float, warmup: bool, rise: float = 0.0, replaces: bool = False
    ) -> None:
        self._decay, self._warmup, self._rise, self._replaces = decay, warmup, rise, replaces
        self.model = copy.deepcopy(model).requires_grad_(False)
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        self._averages = [ours for ours, _ in pairs if ours.is_floating_point()]
        self._values = [theirs for ours, theirs in pairs if ours.is_floating_point()]
        self._copies = [ours for ours, _ in pairs if not ours.is_floating_point()]
        self._counters = [theirs for ours, theirs in pairs if not ours.is_floating_point()]

    @torch.no_grad()
    def restart(self) -> None:
        """Set the average to the current weights."""
        torch._foreach_copy_(self._averages + self._copies, self._values + self._counters)

    @torch.no_grad()
    def update(self, number: int, progress: float = 1.0) -> None:
        """Move towards the current weights, for the `number`-th time (from one), at a place of the run from 0 to 1."""
        torch._foreach_lerp_(self._averages, self._values, 1 - self.decay(number, progress))
        if self._replaces:
            torch._foreach_copy_(self._values, self._averages)
        if self._copies:
            torch._foreach_copy_(self._copies, self._counters)

    def decay(self, number: int, progress: float = 1.0) -> float:
        """Return the decay of the `number`-th update. In the warm-up the average spans a tenth of the updates so far."""
        decay: float = self._decay * progress**self._rise
        return min(decay, (1 + number) / (10 + number)) if self._warmup else decay


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*(parameter.detach() for parameter in model.parameters()), *model.buffers()]


def build_ema(model: nn.Module, train: Train) -> Ema | None:
    if train.ema_decay is None:
        return None
    return Ema(
        model,
        decay=train.ema_decay,
        warmup=train.ema_warmup,
        rise=train.ema_rise,
        replaces=train.ema_replaces,
    )
