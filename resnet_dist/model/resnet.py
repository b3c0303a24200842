"""ResNet: a stem, stages of residual blocks, an average over all pixels, and a linear layer.

    images ── stem ── stage 1 ── stage 2 ── … ── average over H, W ── linear ── logits
                      H x W, C   H/2 x W/2, 2C

table.py defines which blocks a network has, how many and how wide; blocks.py defines what a block does.

Shapes: N batch, C channels, H height, W width, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import BasicBlock, Bottleneck, ResidualBlock
from .layers import conv
from .preactivation import PreActBasicBlock, PreActBottleneck
from .table import Architecture, Options, StemKind


class ResNet(nn.Module):
    """A residual network: float images (N, in_channels, H, W) → logits (N, num_classes).

    With stochastic depth, a forward pass in training needs `scales_NL` from `residual_scales`, one factor per
    sample and block, and raises ValueError without it.
    """

    def __init__(
        self,
        architecture: Architecture,
        options: Options | None = None,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        options = options or Options()
        self.stochastic_depth = options.stochastic_depth
        self.preactivation = architecture.preactivation
        stem = architecture.stem if options.stem == "auto" else options.stem
        width = architecture.stem_channels
        self.conv1 = stem_convolution(stem, in_channels, width)
        # The stem of a v2 net has no norm, because its first block begins with one.
        self.bn1 = nn.Identity() if self.preactivation else nn.BatchNorm2d(width)
        self.pool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = nn.Sequential(*make_stages(architecture, options))
        self.num_blocks = sum(architecture.blocks)
        features = architecture.channels[-1] * block_class(architecture).expansion
        # A v2 net ends in a norm and a ReLU, because its last block returns a bare sum.
        self.norm = nn.BatchNorm2d(features) if self.preactivation else nn.Identity()
        self.fc = nn.Linear(features, num_classes)
        self.apply(init_weights)
        # Zero the last layer of each F: every block starts as its shortcut (arXiv 1706.02677, section 5.1).
        if options.zero_init:
            for block in self.blocks():
                nn.init.zeros_(block.last.weight)  # type: ignore[arg-type]

    def blocks(self) -> Iterator[ResidualBlock]:
        """Yield all blocks in order, from the input to the output."""
        for stage in self.stages:
            yield from stage  # type: ignore[misc]

    def forward(self, images_NCHW: Tensor, scales_NL: Tensor | None = None) -> Tensor:
        if self.training and self.stochastic_depth and scales_NL is None:
            raise ValueError("a training forward with stochastic depth needs scales_NL: see residual_scales")
        x = self.conv1(images_NCHW)
        if not self.preactivation:
            x = F.relu(self.bn1(x))
        x = self.pool(x)
        for number, block in enumerate(self.blocks()):
            x = block(x, None if scales_NL is None else scales_NL[:, number])
        if self.preactivation:
            x = F.relu(self.norm(x))
        x = x.mean(dim=(2, 3))  # (N, C, H, W) → (N, C)
        logits: Tensor = self.fc(x)
        return logits


def stem_convolution(kind: StemKind, in_channels: int, width: int) -> nn.Module:
    """Return the first convolution or convolutions of a net. All kinds but "cifar" halve height and width."""
    if kind == "cifar":
        return conv(in_channels, width, 3)
    if kind == "imagenet":
        return conv(in_channels, width, 7, stride=2)
    # "deep": three 3x3 replace the 7x7, with two more activations (arXiv 1812.01187, ResNet-C).
    half = width // 2
    return nn.Sequential(
        conv(in_channels, half, 3, stride=2),
        nn.BatchNorm2d(half),
        nn.ReLU(),
        conv(half, half, 3),
        nn.BatchNorm2d(half),
        nn.ReLU(),
        conv(half, width, 3),
    )


def make_stages(architecture: Architecture, options: Options) -> list[nn.Module]:
    """Return the stages, each a sequence of blocks.

    The first block of a stage sets its channels and, but in the first stage, halves height and width. The
    others keep the shape.
    """
    kind = block_class(architecture)
    block = partial(kind, shortcut=options.shortcut, se=options.se, blurpool=options.blurpool)
    if kind is Bottleneck:
        block = partial(block, groups=architecture.groups, width_per_group=architecture.width_per_group)
    stages: list[nn.Module] = []
    in_channels = architecture.stem_channels
    for number, (count, channels) in enumerate(zip(architecture.blocks, architecture.channels, strict=True)):
        first = block(in_channels, channels, 1 if number == 0 else 2)
        in_channels = channels * kind.expansion
        stages.append(nn.Sequential(first, *(block(in_channels, channels) for _ in range(count - 1))))
    return stages


def block_class(
    architecture: Architecture,
) -> type[BasicBlock] | type[Bottleneck] | type[PreActBasicBlock] | type[PreActBottleneck]:
    """Return the class of all blocks of a net."""
    if architecture.block == "basic":
        return PreActBasicBlock if architecture.preactivation else BasicBlock
    return PreActBottleneck if architecture.preactivation else Bottleneck


def init_weights(module: nn.Module) -> None:
    """Initialise a convolution so that the variance of gradients survives ReLU layers (arXiv 1502.01852)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
