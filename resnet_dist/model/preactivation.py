"""Blocks of version 2: norm and activation before each convolution (He et al. 2016, arXiv 1603.05027).

    v1   x ──conv─bn─relu─conv─bn──(+)──relu──     v2   x ──bn─relu─conv─bn─relu─conv──(+)──
         └────────────────────────┘                     └─────────────────────────────┘

In v1 the ReLU after the addition cuts off the negative part of every sum. In v2 nothing follows the addition,
so x_L = x_l + ΣF holds exactly between any two blocks of a stage, and nets of 1,001 layers train. The last
block returns a bare sum; the network adds one more norm and ReLU after it.

A projection takes the activated x instead of x, so that no convolution sees an unnormalised signal (as in the
authors' code and in Wide ResNets, arXiv 1605.07146); it therefore needs no norm of its own.

Shapes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import ResidualBlock
from .layers import SqueezeExcite, conv
from .shortcuts import ShortcutKind, make_shortcut


class PreActBlock(ResidualBlock):
    """Common base of the two blocks of version 2: the choice of what the shortcut takes."""

    def skip(self, x: Tensor, activated: Tensor) -> Tensor:
        """Return the input of the shortcut: the activated x for a projection, else x itself."""
        return activated if isinstance(self.shortcut, nn.Sequential) else x


class PreActBasicBlock(PreActBlock):
    """Two 3x3 convolutions, each after norm and activation. Wide ResNets use this block too.

    x ──bn1─relu─conv1─bn2─relu─conv2──(+)── output
    └──────────── shortcut ─────────────┘
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
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride=stride, blurpool=blurpool)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.shortcut = make_shortcut(in_channels, channels, stride, shortcut, norm=False, blurpool=blurpool)
        self.se = SqueezeExcite(channels) if se else nn.Identity()

    @property
    def last(self) -> nn.Module:
        return self.conv2

    def forward(self, x: Tensor, scale_N: Tensor | None = None) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = self.conv1(activated)
        residual = self.conv2(F.relu(self.bn2(residual)))
        return self.add(residual, self.skip(x, activated), scale_N)


class PreActBottleneck(PreActBlock):
    """Three convolutions, 1x1, 3x3 and 1x1, each after norm and activation. The 3x3 has the stride.

    x ──bn1─relu─1x1──bn2─relu─3x3──bn3─relu─1x1──(+)── output
    └────────────────── shortcut ──────────────────┘
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
    ) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride=stride, blurpool=blurpool)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.shortcut = make_shortcut(
            in_channels, out_channels, stride, shortcut, norm=False, blurpool=blurpool
        )
        self.se = SqueezeExcite(out_channels) if se else nn.Identity()

    @property
    def last(self) -> nn.Module:
        return self.conv3

    def forward(self, x: Tensor, scale_N: Tensor | None = None) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = self.conv1(activated)
        residual = self.conv2(F.relu(self.bn2(residual)))
        residual = self.conv3(F.relu(self.bn3(residual)))
        return self.add(residual, self.skip(x, activated), scale_N)
