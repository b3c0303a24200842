"""The shortcut: what carries x past the convolutions of a block, so that they only learn the difference.

Identity wherever the shape allows it: it costs nothing, and whatever a shortcut does to x is done again by
every block below, so anything but the identity makes signals and gradients grow or shrink with depth (He et
al. 2016, arXiv 1603.05027, section 3). Where a stage begins, height and width halve and channels double, and
x must be made to fit:

    kind              height, width                channels                  parameters
    projection        every second pixel           1x1 convolution, norm     some  (option B of arXiv 1512.03385)
    pool-projection   averages of 2x2 pixels       1x1 convolution, norm     some  (the -D nets, arXiv 1812.01187)
    zero-pad          every second pixel           zeros added               none  (option A)
    none              there is no shortcut: the plain net, without the addition

A zero-pad and a plain net have the same parameters, one by one: comparing them isolates the addition.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import BlurPool, conv

ShortcutKind = Literal["projection", "pool-projection", "zero-pad", "none"]


def make_shortcut(
    in_channels: int,
    out_channels: int,
    stride: int,
    kind: ShortcutKind,
    *,
    norm: bool = True,
    blurpool: bool = False,
) -> nn.Module | None:
    """The shortcut of one block: (N, in_channels, H, W) → (N, out_channels, H / stride, W / stride) rounded up.

    None in a plain net. Projections come without batch norm where `norm` is False.
    """
    if kind == "none":
        return None
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if kind == "zero-pad":
        return ZeroPadShortcut(in_channels, out_channels, stride, blurpool=blurpool)

    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if kind == "pool-projection" and stride > 1:
        # A strided 1x1 convolution never looks at three of four pixels; an average looks at all.
        layers["pool"] = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        stride = 1
    # "0" and "1" whatever stands before them: the keys that torchvision's weights have too.
    layers["0"] = conv(in_channels, out_channels, 1, stride=stride, blurpool=blurpool)
    if norm:
        layers["1"] = nn.BatchNorm2d(out_channels)
    return nn.Sequential(layers)


class ZeroPadShortcut(nn.Module):
    """Option A: subsample, and pad the channels with zeros, half before and half after."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, blurpool: bool = False) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"a zero-pad shortcut cannot go from {in_channels} to {out_channels} channels; use projection"
            )
        self.blur = BlurPool(in_channels, stride) if blurpool and stride > 1 else None
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        subsampled = x[:, :, :: self.stride, :: self.stride] if self.blur is None else self.blur(x)
        return F.pad(subsampled, (0, 0, 0, 0, self.before, self.after))  # W, W, H, H, C, C
