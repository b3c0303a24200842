"""Blocks of the second kind, v2: norm and activation come before each convolution (He et al. 2016, 1603.05027).

    v1   x ──conv─bn─relu─conv─bn──(+)──relu──     v2   x ──bn─relu─conv─bn─relu─conv──(+)──
         └────────────────────────┘                     └─────────────────────────────┘

In v1 the relu after the addition stands in the way of x: only a half of its values pass unchanged. In v2
nothing stands there, x_L = x_l + ΣF holds exactly from any block to any later one, and nets of 1,001 layers
train. What the last block returns is not activated yet: the network adds one more norm and relu.

Where a projection is needed, it takes the activated x, so that no block sees a raw signal through a
convolution (the authors' code; Wide ResNets do the same, arXiv 1605.07146). It needs no norm of its own.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import ResidualBlock
from .layers import SqueezeExcite, conv
from .shortcuts import ShortcutKind, make_shortcut


class PreActBlock(ResidualBlock):
    def skip(self, x: Tensor, activated: Tensor) -> Tensor:
        """What the shortcut takes: x itself, unless it is a projection."""
        return activated if isinstance(self.shortcut, nn.Sequential) else x


class PreActBasicBlock(PreActBlock):
    """Two 3x3 convolutions; of Wide ResNets too.

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
    """1x1 down, 3x3, 1x1 up; the 3x3 carries the stride.

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
