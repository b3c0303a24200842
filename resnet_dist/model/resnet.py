"""ResNet: a stem, stages of residual blocks, an average and a linear layer; and the table of named depths."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import BasicBlock, ShortcutKind


@dataclass(frozen=True)
class Depth:
    """Blocks and channels of every stage. Each stage but the first begins by halving height and width."""

    blocks: tuple[int, ...]
    channels: tuple[int, ...]


def cifar_depth(depth: int) -> Depth:
    """The 6n+2 layers of He et al. 2015, section 4.2: stem, three stages of n two-layer blocks, linear."""
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise ValueError(f"depth={depth} is not 6n+2; use 8, 14, 20, 32, 44, 56, 110 …")
    return Depth(blocks=(n, n, n), channels=(16, 32, 64))


MODELS: dict[str, Depth] = {
    # The small net of the tutorial: two blocks of 16 channels, two of 32. With a stem and a linear layer, 10.
    "resnet10_tutorial": Depth(blocks=(2, 2), channels=(16, 32)),
    **{f"resnet{depth}": cifar_depth(depth) for depth in (8, 14, 20, 32, 44, 56, 110, 1202)},
}


class ResNet(nn.Module):
    """(N, in_channels, H, W) float images → (N, num_classes) logits."""

    def __init__(
        self,
        depth: Depth,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        shortcut: ShortcutKind = "projection",
    ) -> None:
        super().__init__()
        width = depth.channels[0]
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(*_stages(depth, shortcut))
        self.fc = nn.Linear(depth.channels[-1], num_classes)
        self.apply(_init_weights)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images_NCHW)))
        x = self.stages(x)
        x = x.mean(dim=(2, 3))  # average over height and width: (N, C)
        logits: Tensor = self.fc(x)
        return logits


def _stages(depth: Depth, shortcut: ShortcutKind) -> list[nn.Module]:
    stages: list[nn.Module] = []
    in_channels = depth.channels[0]
    for number, (blocks, channels) in enumerate(zip(depth.blocks, depth.channels, strict=True)):
        first = BasicBlock(in_channels, channels, stride=1 if number == 0 else 2, shortcut=shortcut)
        rest = [BasicBlock(channels, channels, shortcut=shortcut) for _ in range(blocks - 1)]
        stages.append(nn.Sequential(first, *rest))
        in_channels = channels
    return stages


def _init_weights(module: nn.Module) -> None:
    # He et al. 2015, arXiv 1502.01852: keeps the variance of activations through ReLU layers.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build_model(
    name: str,
    *,
    in_channels: int,
    num_classes: int,
    shortcut: ShortcutKind = "projection",
    seed: int | None = None,
) -> ResNet:
    """The network called `name` in MODELS. With a seed its weights are the same on every rank and machine.

    Raises KeyError for an unknown name; the recipe is checked against MODELS before anything starts.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return ResNet(MODELS[name], in_channels=in_channels, num_classes=num_classes, shortcut=shortcut)


def count_parameters(model: nn.Module) -> int:
    """Trainable scalars of `model`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
