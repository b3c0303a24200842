"""Weights from elsewhere: torchvision's names for ours, and a report of what did not match.

torchvision calls a stage `layer1`, and a projection shortcut `downsample`; everything else has the same name
here, so weights go both ways by renaming.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HEAD = "fc."  # the layer that depends on the classes
COUNTERS = "num_batches_tracked"  # of batch norms: used by nobody here, and left out of old files
MAX_NAMED = 6  # tensors named in one list of a report

State = Mapping[str, Tensor]


def from_torchvision(state: State) -> dict[str, Tensor]:
    """Our names for torchvision's; names that are ours already stay as they are."""
    return {_ours(name): value for name, value in state.items()}


def to_torchvision(state: State) -> dict[str, Tensor]:
    """torchvision's names for those of a ResNet of ours."""
    return {_theirs(name): value for name, value in state.items()}


def _ours(name: str) -> str:
    name = re.sub(r"^layer(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.", name)
    return name.replace(".downsample.", ".shortcut.")


def _theirs(name: str) -> str:
    name = re.sub(r"^stages\.(\d+)\.", lambda found: f"layer{int(found[1]) + 1}.", name)
    return name.replace(".shortcut.", ".downsample.")


@dataclass(frozen=True)
class Match:
    """Which tensors of some weights fit a model, and which do not."""

    fitting: tuple[str, ...]
    missing: tuple[str, ...]  # of the model, without a counterpart
    unexpected: tuple[str, ...]  # of the weights, without a counterpart
    wrong_shape: tuple[str, ...]  # name, both shapes
    model_share: float  # of the model's numbers, its head left out: how many fit
    weights_share: float  # of those of the weights

    def __str__(self) -> str:
        """One line: `122 of 122 tensors fit`, and the names of those that do not."""
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
    """Compare names and shapes; changes nothing, and either side may lie on the meta device."""
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
    """Copy into `model` every tensor that fits, and say which do not. The others keep their values."""
    found = match(model, state)
    own = model.state_dict()
    for name in found.fitting:
        own[name].copy_(state[name])
    return found


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
