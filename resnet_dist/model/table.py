"""The table of networks: what each name builds.

Parameters are counted with ten classes (CIFAR) or 1,000 (ImageNet):

resnet20 … resnet1202   6n+2 layers for CIFAR (arXiv 1512.03385, section 4.2)     0.27 … 19.4 M
resnet18 … resnet152    for ImageNet, v1.5                                        11.7 … 60.2 M
resnext…                grouped convolutions (arXiv 1611.05431)                   25.0 … 88.8 M
wide_resnet…            torchvision's, the 3x3 twice as wide                      68.9, 126.9 M
wrn16_4 … wrn40_4       depth and width factor of 6n+4 layers for CIFAR (arXiv 1605.07146)
preresnet20 … 1001      v2 for CIFAR, with bottlenecks from 164 layers on (arXiv 1603.05027)
preresnet18 … 200       v2 for ImageNet
resnet9_fast            94 % on CIFAR-10 in seconds of one GPU: see fast.py
resnet10_tutorial       small enough to follow every tensor
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .shortcuts import ShortcutKind

StemKind = Literal["auto", "cifar", "imagenet", "deep"]
WhiteningKind = Literal["covariance", "second-moment"]


@dataclass(frozen=True)
class Architecture:
    """Blocks and inner channels of each stage. All stages but the first halve height and width."""

    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    block: Literal["basic", "bottleneck"] = "basic"
    stem: StemKind = "cifar"
    stem_channels: int = 16
    preactivation: bool = False
    groups: int = 1
    width_per_group: int = 64


@dataclass(frozen=True)
class FastArchitecture:
    """Channels of the three stages of a FastResNet."""

    channels: tuple[int, int, int]


@dataclass(frozen=True)
class Options:
    """The variations of a network. resnet9_fast accepts the last two alone, of which the last is its own."""

    shortcut: ShortcutKind = "projection"
    """How x is made to fit where the shape changes (see shortcuts.py). "none" makes a plain net."""
    stem: StemKind = "auto"
    """auto: as in the table. cifar: one 3x3. imagenet: a 7x7 and a max-pool, both of stride 2. deep: three
    3x3 in place of the 7x7."""
    zero_init: bool = False
    """Start with F = 0 in every block."""
    se: bool = False
    """Squeeze-and-excitation in every block."""
    blurpool: bool = False
    """Blur before every strided convolution of a block."""
    stochastic_depth: float = 0.0
    """Probability that a training step drops the last block for a sample; earlier blocks: linearly less."""
    norm_eps: float = 1e-5
    """Term added to the variance in batch norms."""
    whitening: WhiteningKind = "covariance"
    """What the whitening layer is computed from (see fast.py)."""


def _cifar(depth: int, *, preactivation: bool = False) -> Architecture:
    """Return a net of three stages of n blocks: 6n+2 layers with basic blocks, 9n+2 with bottlenecks."""
    # The paper of v2 uses bottlenecks in its nets of 164 and 1,001 layers (arXiv 1603.05027).
    bottleneck = preactivation and depth >= 164
    n, rest = divmod(depth - 2, 9 if bottleneck else 6)
    assert n >= 1, depth
    assert rest == 0, depth
    block: Literal["basic", "bottleneck"] = "bottleneck" if bottleneck else "basic"
    return Architecture((n, n, n), (16, 32, 64), block, preactivation=preactivation)


def _wide(depth: int, factor: int) -> Architecture:
    """Return WRN-depth-factor: 6n+4 layers, which counts the stem and a projection in each stage."""
    n, rest = divmod(depth - 4, 6)
    assert rest == 0, depth
    return Architecture((n, n, n), (16 * factor, 32 * factor, 64 * factor), preactivation=True)


def _imagenet(
    depth: int, *, groups: int = 1, width_per_group: int = 64, preactivation: bool = False
) -> Architecture:
    blocks = {
        18: (2, 2, 2, 2),
        34: (3, 4, 6, 3),
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
        200: (3, 24, 36, 3),
    }[depth]
    return Architecture(
        blocks,
        (64, 128, 256, 512),
        "basic" if depth < 50 else "bottleneck",
        stem="imagenet",
        stem_channels=64,
        preactivation=preactivation,
        groups=groups,
        width_per_group=width_per_group,
    )


MODELS: dict[str, Architecture | FastArchitecture] = {
    # 10 layers: the stem, two blocks of 16 channels, two of 32, and the linear layer.
    "resnet10_tutorial": Architecture((2, 2), (16, 32)),
    "resnet9_fast": FastArchitecture((64, 256, 256)),
    **{f"resnet{depth}": _cifar(depth) for depth in (8, 14, 20, 32, 44, 56, 110, 1202)},
    **{f"resnet{depth}": _imagenet(depth) for depth in (18, 34, 50, 101, 152)},
    "resnext50_32x4d": _imagenet(50, groups=32, width_per_group=4),
    "resnext101_32x8d": _imagenet(101, groups=32, width_per_group=8),
    "resnext101_64x4d": _imagenet(101, groups=64, width_per_group=4),
    "resnext29_8x64d": Architecture((3, 3, 3), (64, 128, 256), "bottleneck", stem_channels=64, groups=8),
    "wide_resnet50_2": _imagenet(50, width_per_group=128),
    "wide_resnet101_2": _imagenet(101, width_per_group=128),
    **{
        f"wrn{depth}_{factor}": _wide(depth, factor)
        for depth, factor in ((16, 4), (16, 8), (22, 8), (28, 2), (28, 10), (40, 1), (40, 2), (40, 4))
    },
    **{f"preresnet{depth}": _cifar(depth, preactivation=True) for depth in (20, 56, 110, 164, 1001)},
    **{f"preresnet{depth}": _imagenet(depth, preactivation=True) for depth in (18, 34, 50, 101, 152, 200)},
}
