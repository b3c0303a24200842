"""The residual block: output = F(x) + x. Start here to learn what a residual network is.

A plain stack of layers must learn the whole mapping H(x). A residual block learns only the difference
F(x) = H(x) - x, and adds its input back:

            plain                          residual

              x                                x ───────┐
              │                                │        │
          convolutions                   convolutions   │ shortcut
              │                                │        │
              H(x)                           F(x) ──(+)─┘
                                                     │
                                                 F(x) + x

1. Doing nothing is easy. A plain block must learn the identity, layer by layer; a residual block only needs
   F = 0, towards which weight decay pulls it and where it may even start (`zero_init`). A deeper net can thus
   always match a shallower one, by F = 0 in the additional blocks: a solution that training does not find in
   plain nets of 56 layers (He et al. 2015, arXiv 1512.03385, figure 6).
2. The gradient survives. Let x_l be the input of block l. A later block L receives

       x_L = x_l + F(x_l) + F(x_{l+1}) + … + F(x_{L-1}),    so

       dLoss/dx_l = dLoss/dx_L · (1 + d/dx_l ΣF)

   The 1 reaches every block undiminished, however many blocks follow it (He et al. 2016, arXiv 1603.05027,
   equation 5). In a plain net the gradient is a product of as many factors as there are layers: it vanishes
   or explodes. (Exact for the blocks of preactivation.py; those below have a ReLU after each addition.)

There are four blocks: basic or bottleneck, each with the activation after the addition (v1, below) or before
the convolutions (v2, in preactivation.py). All map

    (N, in_channels, H, W)  →  (N, channels * expansion, ceil(H / stride), ceil(W / stride))

and take `scale_N`, one stochastic-depth factor per sample of a training step (see stochastic_depth.py).

Shapes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import SqueezeExcite, conv
from .shortcuts import ShortcutKind, make_shortcut


class ResidualBlock(nn.Module, ABC):
    """Common base of the four blocks: the addition of F(x) and x."""

    expansion = 1  # output channels per inner channel
    shortcut: nn.Module | None  # None in a plain net
    se: nn.Module  # squeeze-and-excitation of F(x), or the identity

    @property
    @abstractmethod
    def last(self) -> nn.Module:
        """The last layer of F: with its weight and bias zero, F = 0."""

    def add(self, residual: Tensor, x: Tensor, scale_N: Tensor | None) -> Tensor:
        """Return F(x) + shortcut(x), or F(x) alone in a plain net; `residual` is F(x)."""
        residual = self.se(residual)
        if scale_N is not None:
            residual = residual * scale_N.to(residual.dtype)[:, None, None, None]
        if self.shortcut is not None:
            residual = residual + self.shortcut(x)  # output = F(x) + x
        return residual


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut around them (arXiv 1512.03385, figure 2).

        x ──conv1─bn1─relu─conv2─bn2──(+)──relu── output
        └────────── shortcut ──────────┘

    `shortcut="none"` makes it a plain block: the same layers without the addition.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        shortcut: ShortcutKind = "projection",
        se: bool = False,
        blurpool: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride=stride, blurpool=blurpool)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = make_shortcut(in_channels, channels, stride, shortcut, blurpool=blurpool)
        self.se = SqueezeExcite(channels) if se else nn.Identity()

    @property
    def last(self) -> nn.Module:
        return self.bn2

    def forward(self, x: Tensor, scale_N: Tensor | None = None) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return F.relu(self.add(residual, x, scale_N))


class Bottleneck(ResidualBlock):
    """Three convolutions, 1x1, 3x3, 1x1: as much arithmetic as a basic block, on four times the channels.

    The first 1x1 reduces the channels, the 3x3 works on few, the last 1x1 restores them (arXiv 1512.03385,
    figure 5).

        x ──1x1─bn1─relu──3x3─bn2─relu──1x1─bn3──(+)──relu── output
        └──────────────── shortcut ───────────────┘
        4C       C             C           4C                         channels

    This is v1.5, as in torchvision and in the MLPerf rules: the 3x3 has the stride. In the paper the first
    1x1 has it and discards three of four pixels unseen; v1.5 is about half a point of top-1 better.

    Split into `groups`, the 3x3 becomes the parallel paths of ResNeXt (arXiv 1611.05431); widened by
    `width_per_group`, it becomes torchvision's Wide ResNet.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        shortcut: ShortcutKind = "projection",
        se: bool = False,
        blurpool: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        super().__init__()
        width, out_channels = channels * width_per_group // 64 * groups, channels * self.expansion
        self.conv1 = conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride=stride, groups=groups, blurpool=blurpool)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = make_shortcut(in_channels, out_channels, stride, shortcut, blurpool=blurpool)
        self.se = SqueezeExcite(out_channels) if se else nn.Identity()

    @property
    def last(self) -> nn.Module:
        return self.bn3

    def forward(self, x: Tensor, scale_N: Tensor | None = None) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = F.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return F.relu(self.add(residual, x, scale_N))
