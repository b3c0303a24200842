"""A small residual net for speed runs on CIFAR-10, whose goal is 94 % in seconds of one GPU.

    images ─ whiten 2x2 ─ stage ─ stage ─ stage ─ max over H, W ─ linear · 1/9 ─ logits

    stage    x ──conv─pool─bn─gelu──┬─────────────────────────────(+)──
                                    └─ conv─bn─gelu─conv─bn─gelu ──┘        (the middle stage has no block)

It has nine layers with weights, in the shape of Page's ResNet-9 (How to train your ResNet, 2018), with the
widths of airbench94 (Jordan 2024, arXiv 2404.00498). From airbench94 come the parts that let it converge in
ten epochs:

- The first layer is computed, not learnt: its filters whiten the 2x2 patches of the training images. Each
  filter comes with its negative, so that the activation loses nothing. Only the bias trains.
- The convolution of each stage starts as the identity on as many channels as it can (Dirac).
- Norms have no scale, only a bias, which tolerates a learning rate far above that of the weights.
- A constant scales the logits down; otherwise the linear layer saturates the softmax in the first steps.

The pool lies inside a stage and before its block, so every shortcut is the plain identity. The max over all
pixels makes the net independent of the image size, which a training run may raise as it proceeds.

Shapes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .table import FastArchitecture, WhiteningKind

LOGIT_SCALE = 1 / 9
MIN_IMAGE_SIZE = 9  # pixels: the whitening takes one, then three halvings leave one
# Images whose patches are in memory at a time: in double precision they take 8 times as much as the images.
IMAGES_PER_CHUNK = 64
WHITENING_EPS = 5e-4  # added to variances, so that directions without signal are not amplified
# Running statistics average the last few batches only, because a run has a few hundred steps.
NORM_MOMENTUM = 0.4


class FastResNet(nn.Module):
    """The fast net: float images (N, in_channels, H, W) → logits (N, num_classes).

    Call `whiten` before the first training step. Height and width must be MIN_IMAGE_SIZE or more.
    """

    def __init__(
        self, architecture: FastArchitecture, *, in_channels: int = 3, num_classes: int = 10
    ) -> None:
        super().__init__()
        filters = 2 * in_channels * 4
        first, second, third = architecture.channels
        self.whitening = nn.Conv2d(in_channels, filters, 2)
        self.whitening.weight.requires_grad_(False)
        self.stages = nn.Sequential(
            FastStage(filters, first, residual=True),
            FastStage(first, second, residual=False),
            FastStage(second, third, residual=True),
        )
        self.fc = nn.Linear(third, num_classes, bias=False)
        self.whitening.bias.data.zero_()  # type: ignore[union-attr]

    def forward(self, images_NCHW: Tensor) -> Tensor:
        x = F.gelu(self._whitened(images_NCHW))
        x = self.stages(x)
        x = x.amax(dim=(2, 3))  # (N, C, H, W) → (N, C)
        logits: Tensor = self.fc(x) * LOGIT_SCALE
        return logits

    def _whitened(self, images_NCHW: Tensor) -> Tensor:
        """Return the output of the first layer, in fp32 under autocast too.

        It enlarges small differences of pixels. In bf16 their rounding would be noise of up to a seventh of the output's
        deviation in the directions of smallest variance; in TF32 and fp16, it is 2 %.
        """
        device = images_NCHW.device.type
        # The meta device has no autocast, and nothing to round.
        if images_NCHW.is_meta or not torch.is_autocast_enabled(device):
            out: Tensor = self.whitening(images_NCHW)
            return out
        with torch.autocast(device, enabled=False):
            return self.whitening(images_NCHW.float())  # type: ignore[no-any-return]

    @torch.no_grad()
    def whiten(self, filters: Tensor) -> None:
        """Set the weights of the first layer to those of `whitening_filters`, (2 · 4C, C, 2, 2)."""
        self.whitening.weight.copy_(filters)


class FastStage(nn.Module):
    """A convolution that changes the channels, a pool that halves height and width (rounding down), and, with
    `residual`, a residual block.
    """

    def __init__(self, in_channels: int, out_channels: int, *, residual: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        nn.init.dirac_(self.conv.weight.data[: min(in_channels, out_channels)])
        self.pool = nn.MaxPool2d(2)
        self.norm = bias_norm(out_channels)
        self.block = FastBlock(out_channels) if residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.pool(self.conv(x))))
        out: Tensor = self.block(x)
        return out


class FastBlock(nn.Module):
    """The residual block F(x) + x, where F is two convolutions, each with norm and activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = bias_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = bias_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.gelu(self.norm1(self.conv1(x)))
        residual = F.gelu(self.norm2(self.conv2(residual)))
        return residual + x


def bias_norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm whose scale stays one."""
    norm = nn.BatchNorm2d(channels, momentum=NORM_MOMENTUM)
    norm.weight.requires_grad_(False)
    return norm


def whitening_filters(batches: Iterable[Tensor], kind: WhiteningKind = "covariance") -> Tensor:
    """Return filters (2 · 4C, C, 2, 2) whose outputs on images (N, C, H, W) are uncorrelated, of variance 1.

    They are the principal directions of the 2x2 patches, each divided by its standard deviation, and then the
    negatives of all of them. Their outputs are uncorrelated within each half. kind: what is diagonalized; of the second
    moment, as in airbench94, it is the mean squares of outputs that are 1 and their mean products that are 0.
    """
    covariance, channels = patch_products(batches, centered=kind == "covariance")
    variances, directions = torch.linalg.eigh(covariance)
    vectors = directions.T
    # Make the largest entry of each vector positive: libraries choose the signs of eigenvectors differently.
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    vectors = vectors * largest.sign() / (variances + WHITENING_EPS).sqrt()[:, None]
    return torch.cat([vectors, -vectors]).reshape(-1, channels, 2, 2).float()


def patch_products(batches: Iterable[Tensor], *, centered: bool) -> tuple[Tensor, int]:
    """Return the mean products of all 2x2 patches, (4C, 4C), and C. centered: around their mean, as in a covariance.

    They are in double precision, because the smallest variance may be 1e-4 of the largest.
    """
    count, total, products, channels = 0, torch.zeros(()), torch.zeros(()), 0
    for images_NCHW in batches:
        channels = images_NCHW.shape[1]
        for chunk in images_NCHW.double().split(IMAGES_PER_CHUNK):
            patches = chunk.unfold(2, 2, 1).unfold(3, 2, 1)  # (N, C, H - 1, W - 1, 2, 2)
            rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels * 4)
            count += len(rows)
            total = total.to(rows) + rows.sum(dim=0)
            products = products.to(rows) + rows.T @ rows
    mean = total / count
    return products / count - (torch.outer(mean, mean) if centered else 0), channels
