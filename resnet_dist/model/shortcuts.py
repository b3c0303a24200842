"""The shortcut: the path of x around the convolutions of a block, so that they learn only the difference.

It is the identity wherever the shape allows it. That costs nothing, and it keeps signals and gradients at
their size: any other function would be applied once per block, so that with depth they would grow or shrink
(He et al. 2016, arXiv 1603.05027, section 3). Where a stage begins, height and width halve and the channels
double, and x must be made to fit:

    kind              height, width             channels                 parameters
    projection        every second pixel        1x1 convolution, norm    some  (option B of arXiv 1512.03385)
    pool-projection   averages of 2x2 pixels    1x1 convolution, norm    some  (the -D nets, arXiv 1812.01187)
    zero-pad          every second pixel        zeros added              none  (option A of arXiv 1512.03385)
    none              no shortcut and no addition: the plain net

A net with zero-pad and a plain net have the same parameters, tensor by tensor: to compare them isolates the
effect of the addition.
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
    """Return the shortcut of one block, or None for a plain net.

    It maps (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)). With `norm`, a
    projection ends in a batch norm. With `blurpool`, subsampling blurs first (see layers.py). Raises
    ValueError for a zero-pad that would have to remove channels.
    """
    if kind == "none":
        return None
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if kind == "zero-pad":
        return ZeroPadShortcut(in_channels, out_channels, stride, blurpool=blurpool)

    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if kind == "pool-projection" and stride > 1:
        # Average first: a 1x1 convolution of stride 2 ignores three of four pixels, an average uses them all.
        layers["pool"] = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        stride = 1
    # The keys are "0" and "1" with and without a pool, so that torchvision's weights fit.
    layers["0"] = conv(in_channels, out_channels, 1, stride=stride, blurpool=blurpool)
    if norm:
        layers["1"] = nn.BatchNorm2d(out_channels)
    return nn.Sequential(layers)


class ZeroPadShortcut(nn.Module):
    """Option A: subsample x and pad its channels with zeros, half of them before and half after.

    Raises ValueError where out_channels < in_channels.
    """

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
        # F.pad takes pairs (before, after) from the last axis to the first: W, H, C.
        return F.pad(subsampled, (0, 0, 0, 0, self.before, self.after))
