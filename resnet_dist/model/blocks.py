"""The residual block: output = relu(F(x) + x).

A plain stack of layers must learn the whole mapping H(x). A residual block learns F(x) = H(x) - x and adds
its input back. To do nothing, a plain block must learn the identity; a residual block only needs F = 0. And
the gradient of the sum reaches x undiminished, however many blocks lie above. That is why networks with skip
connections train at depths where plain ones fail (He et al. 2015, arXiv 1512.03385).

Shapes: N batch, C channels, H height, W width.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

ShortcutKind = Literal["projection", "zero-pad", "none"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them (He et al. 2015, figure 2).

        x ──conv1─bn1─relu─conv2─bn2──(+)──relu── output
        └────────── shortcut ──────────┘

    (N, in_channels, H, W) → (N, out_channels, ceil(H / stride), ceil(W / stride)).
    `shortcut="none"` gives the plain block of the same layers, without the addition.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, shortcut: ShortcutKind = "projection"
    ) -> None:
        super().__init__()
        # No bias: the batch norm that follows would subtract it again.
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = make_shortcut(in_channels, out_channels, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        if self.shortcut is not None:
            residual = residual + self.shortcut(x)  # F(x) + x
        return F.relu(residual)


def make_shortcut(in_channels: int, out_channels: int, stride: int, kind: ShortcutKind) -> nn.Module | None:
    """What carries x past the convolutions; None in a plain net.

    Identity wherever the shape allows it. Where the shape changes, `projection` is a strided 1x1 convolution
    with batch norm (option B of the paper), `zero-pad` takes every stride-th pixel and fills the new channels
    with zeros (option A, no parameters).
    """
    if kind == "none":
        return None
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if kind == "zero-pad":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class ZeroPadShortcut(nn.Module):
    """Option A: subsample, and pad the channels with zeros, half before and half after."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"a zero-pad shortcut cannot go from {in_channels} to {out_channels} channels; use projection"
            )
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        subsampled = x[:, :, :: self.stride, :: self.stride]
        return F.pad(subsampled, (0, 0, 0, 0, self.before, self.after))  # W, W, H, H, C, C
