"""The small layers of which blocks are built: convolution, anti-aliasing blur, squeeze-and-excitation.

Shapes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Channels of the feature map per channel of its summary: the ratio r of arXiv 1709.01507, section 6.1.
SQUEEZE_RATIO = 16


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    blurpool: bool = False,
) -> nn.Conv2d:
    """Return a convolution that keeps height and width, or divides them by `stride` and rounds up.

    It has no bias, because the batch norm that follows would subtract it. With `blurpool`, a strided
    convolution blurs its input first.
    """
    kind = BlurConv2d if blurpool and stride > 1 else nn.Conv2d
    return kind(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        groups=groups,
        bias=False,
    )


class BlurPool(nn.Module):
    """A 3x3 binomial blur that keeps every `stride`-th pixel (Zhang 2019, arXiv 1904.11486).

    To take every second pixel of a signal folds its high frequencies onto its low ones (aliasing), so an
    image shifted by one pixel gives different features. The blur first removes the frequencies that the
    coarser grid cannot hold.
    """

    kernel: Tensor

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.channels = stride, channels
        binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = torch.outer(binomial, binomial).expand(channels, 1, 3, 3).contiguous()
        # Keep the constant out of the state dict, so that a net has the same keys with and without blur.
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, stride=self.stride, padding=1, groups=self.channels)


class BlurConv2d(nn.Conv2d):
    """A strided convolution that blurs its input first."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int,
        padding: int,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        # A strided 1x1 convolution reads only the pixels that it keeps. Let the blur subsample instead: at
        # stride 2 it then computes a quarter of the pixels, with the same result.
        pointwise = kernel_size == 1
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=1 if pointwise else stride,
            padding=padding,
            groups=groups,
            bias=bias,
        )
        self.blur = BlurPool(in_channels, stride if pointwise else 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.blur(x))


class SqueezeExcite(nn.Module):
    """A gate from 0 to 1 on every channel, computed from the whole image (Hu et al. 2017, arXiv 1709.01507).

        x ──┬───────────────────────────────────────────────(×)── output
            └─ average over H, W ─ fc1 ─ relu ─ fc2 ─ sigmoid ─┘

    A convolution sees a neighbourhood; the gates turn channels up or down by what the whole image shows.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(1, channels // SQUEEZE_RATIO)
        self.fc1 = nn.Linear(channels, squeezed)
        self.fc2 = nn.Linear(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        gates_NC = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3))))))
        return x * gates_NC[:, :, None, None]
