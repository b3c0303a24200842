"""The norm of every convolution's gradient: how much of the loss signal arrives at each layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GRADIENT_NORMS = "gradient_norms"  # their name in Tracker.log_layers


class GradientNorms:
    """The L2 norms of the gradients of a model's convolution weights, by layer, in the order of its modules.

    A gradient is measured after it is averaged over the ranks, so that any number of ranks measures the same, and
    before it is clipped and applied. The norms stay on the device until they are read.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = {
            name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
        }
        self._layers, self._weights = tuple(weights), tuple(weights.values())
        self._norms: Tensor | None = None

    def measure(self, loss_scale: float = 1.0) -> None:
        """Compute the norms of the current `.grad`, which comes from a loss multiplied by `loss_scale`.

        A convolution without a gradient has norm 0.
        """
        norms = torch._foreach_norm([_gradient(weight) for weight in self._weights])
        self._norms = torch.stack(norms) / loss_scale

    def read(self) -> dict[str, float]:
        """Return the norms of the newest `measure`, by the name of the layer. Waits for the device."""
        assert self._norms is not None, "nothing was measured"
        return dict(zip(self._layers, self._norms.tolist(), strict=True))


def _gradient(weight: Tensor) -> Tensor:
    return weight.grad if weight.grad is not None else weight.new_zeros(())
