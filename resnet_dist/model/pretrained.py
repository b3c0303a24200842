"""Weights from elsewhere: torchvision's names for ours, and a report of what does not fit.

torchvision calls a stage `layer1` and a projection shortcut `downsample`. All other names are the same here,
so weights convert both ways by renaming.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HEAD = "fc."  # prefix of the layer whose shape depends on the classes
# Suffix of batch norm's counters. They are ignored: no net here uses them, and old files lack them.
COUNTERS = "num_batches_tracked"
MAX_NAMED = 6  # tensors that one list of a report names

State = Mapping[str, Tensor]


def from_torchvision(state: State) -> dict[str, Tensor]:
    """Return the weights under our names; names that are already ours stay as they are."""
    return {_ours(name): value for name, value in state.items()}


def to_torchvision(state: State) -> dict[str, Tensor]:
    """Return the weights of one of our ResNets under torchvision's names."""
    return {_theirs(name): value for name, value in state.items()}


def _ours(name: str) -> str:
    name = re.sub(r"^layer(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.", name)
    return name.replace(".downsample.", ".shortcut.")


def _theirs(name: str) -> str:
    name = re.sub(r"^stages\.(\d+)\.", lambda found: f"layer{int(found[1]) + 1}.", name)
    return name.replace(".shortcut.", ".downsample.")


@dataclass(frozen=True)
class Match:
    """The comparison of some weights with a model: the tensors that fit, and those that do not."""

    fitting: tuple[str, ...]
    missing: tuple[str, ...]  # names in the model only
    unexpected: tuple[str, ...]  # names in the weights only
    wrong_shape: tuple[str, ...]  # name and both shapes
    model_share: float  # share of the model's numbers, without its head, that the weights fill
    weights_share: float  # share of the numbers in the weights, without their head, that the model takes

    def __str__(self) -> str:
        """Return one line: `122 of 122 tensors fit`, then the names of those that do not."""
        total = len(self.fitting) + len(self.missing) + len(self.wrong_shape)
        parts = [f"{len(self.fitting)} of {total} tensors fit"]
        for title, names in (
            ("wrong shape", self.wrong_shape),
            ("missing", self.missing),
            ("not used", self.unexpected),
        ):
            if names:
                parts.append(f"{title}: {_listed(names)}")
        return "; ".join(parts)


def match(model: nn.Module, state: State) -> Match:
    """Compare the names and shapes of a model's tensors with those of `state`.

    Nothing is changed, and either side may be on the meta device.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.endswith(COUNTERS)}
    theirs = {name: value for name, value in state.items() if not name.endswith(COUNTERS)}
    common = [name for name in own if name in theirs]
    fitting = tuple(name for name in common if own[name].shape == theirs[name].shape)

    def fitting_share(state: State) -> float:
        body = {name: value.numel() for name, value in state.items() if not name.startswith(HEAD)}
        return sum(body.get(name, 0) for name in fitting) / max(1, sum(body.values()))

    return Match(
        fitting=fitting,
        missing=tuple(name for name in own if name not in theirs),
        unexpected=tuple(name for name in theirs if name not in own),
        wrong_shape=tuple(
            f"{name} {tuple(theirs[name].shape)}, the model has {tuple(own[name].shape)}"
            for name in common
            if name not in fitting
        ),
        model_share=fitting_share(own),
        weights_share=fitting_share(theirs),
    )


@torch.no_grad()
def load_fitting(model: nn.Module, state: State) -> Match:
    """Copy every tensor that fits into `model`; return the comparison. Other tensors keep their values."""
    found = match(model, state)
    own = model.state_dict()
    for name in found.fitting:
        own[name].copy_(state[name])
    return found


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
