"""airbench94 as its paper describes it (Jordan 2024, arXiv 2404.00498), to be run beside ours on the same card.

A plain net of six convolutions behind a whitening layer of the second moment of 5,000 images: data on the device,
alternating flips, shifts of two reflected pixels, Nesterov SGD with a rate of biases 64 times as high, a triangular
schedule, an average of the weights that replaces them every fifth step (lookahead), half precision, and an evaluation of
mirrored and shifted images.

Shapes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_dist.config import Data
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.shards.index import read_index
from resnet_dist.model import whitening_filters
from resnet_dist.train.evaluate import evaluation_order
from resnet_dist.world import World
from tests.benchmarks.gpu.setting import Run

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Settings:
    """The paper's values."""

    widths: tuple[int, int, int] = (64, 256, 256)
    epochs: float = 9.9
    batch_size: int = 1024
    learning_rate: float = 11.5  # for a batch of 1,024, decoupled from the momentum
    momentum: float = 0.85
    weight_decay: float = 0.0153  # likewise
    bias_scale: float = 64.0
    label_smoothing: float = 0.2
    whitening_bias_epochs: int = 3
    whitening_images: int = 5_000
    shift: int = 2
    warm_up_steps: int = 5


TINY = Settings(widths=(8, 8, 8), epochs=2, batch_size=16, whitening_images=16)


@dataclass(frozen=True)
class Images:
    """A split on the device: normalized images (N, C, H, W) and labels."""

    images: Tensor
    labels: Tensor


def read(folder: Path, device: torch.device) -> tuple[Images, Images]:
    """Return the training and the evaluation set, decoded."""
    return _read(folder / "train", device), _read(folder / "eval", device)


def _read(shards: Path, device: torch.device) -> Images:
    index = read_index(str(shards))
    data = Data(train=str(shards), eval=str(shards), image_size=32, global_batch_size=64)
    order = evaluation_order(index, data)
    with Loader(index, order, data, World.single(), seed=0) as loader:
        batches = [loader.batch_at(step) for step in range(order.steps_per_epoch)]
        kept = torch.cat([batch.weights_B for batch in batches]) > 0
        images = torch.cat([batch.images_BSSC.clone() for batch in batches])[kept]
        labels = torch.cat([batch.labels_B.clone() for batch in batches])[kept]
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
    scaled = (images.to(device).permute(0, 3, 1, 2).float() / 255 - mean) / std
    half = torch.half if device.type == "cuda" else torch.float
    return Images(scaled.to(half).contiguous(memory_format=torch.channels_last), labels.to(device))


class Group(nn.Module):
    """conv, pool, norm, GELU, conv, norm, GELU; the convolutions begin as the identity as far as they can."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight.data[: conv.weight.shape[1]])
        self.norm1, self.norm2 = (nn.BatchNorm2d(after, eps=1e-12, momentum=0.4) for _ in range(2))
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class Net(nn.Module):
    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.whitening = nn.Conv2d(3, 24, 2)
        self.whitening.weight.requires_grad_(False)
        self.whitening.bias.data.zero_()  # type: ignore[union-attr]
        sizes = (24, *widths)
        self.groups = nn.Sequential(*(Group(sizes[i], sizes[i + 1]) for i in range(3)))
        self.head = nn.Linear(widths[-1], 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.groups(F.gelu(self.whitening(x))), 3)
        logits: Tensor = self.head(x.flatten(1)) / 9
        return logits


class Training:
    """Trains the net with one seed after another."""

    def __init__(
        self, data: tuple[Images, Images], settings: Settings, device: torch.device, now: Callable[[], float]
    ) -> None:
        self.train, self.test = data
        self.settings, self.device, self.now = settings, device, now
        self.half = self.train.images.dtype
        self.warm = False
        torch.backends.cudnn.benchmark = True  # as the source has it

    def run(self, seed: int) -> Run:
        """Train with a seed. The first run is preceded by all that chooses kernels, on another net of the same shapes."""
        torch.manual_seed(seed)
        if not self.warm:
            warming = self._whitened(self._net())
            self._steps(warming, self.settings.warm_up_steps)
            self._evaluate(warming)
            self.warm = True
        net = self._net()
        times = [self.now()]
        self._whitened(net)
        times.append(self.now())
        self._steps(net, None)
        times.append(self.now())
        top1 = self._evaluate(net)
        times.append(self.now())
        return Run(*(later - earlier for earlier, later in pairwise(times)), top1)

    def _whitened(self, net: Net) -> Net:
        sample = self.train.images[: self.settings.whitening_images].float()
        filters = whitening_filters(sample.split(1_000), "second-moment")
        net.whitening.weight.data.copy_(filters)
        return net

    def _net(self) -> Net:
        net = Net(self.settings.widths).to(self.device)
        net = net.to(memory_format=torch.channels_last).to(self.half)  # type: ignore[call-overload]
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
        return net

    def _optimizer(self, net: Net) -> torch.optim.SGD:
        settings = self.settings
        kilostep = 1024 * (1 + 1 / (1 - settings.momentum))
        rate = settings.learning_rate / kilostep
        decay = settings.weight_decay * settings.batch_size / kilostep
        trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        biases = [p for name, p in trained if "norm" in name]
        others = [p for name, p in trained if "norm" not in name]
        scaled = rate * settings.bias_scale
        return torch.optim.SGD(
            [
                {"params": biases, "lr": scaled, "weight_decay": decay / scaled, "peak": scaled},
                {"params": others, "lr": rate, "weight_decay": decay / rate, "peak": rate},
            ],
            momentum=settings.momentum,
            nesterov=True,
        )

    def _steps(self, net: Net, limit: int | None) -> None:
        """Train to the end, or for `limit` steps."""
        settings, optimizer = self.settings, self._optimizer(net)
        per_epoch = len(self.train.labels) // settings.batch_size
        total = int(settings.epochs * per_epoch + 0.999)
        slow = {name: value.clone() for name, value in net.state_dict().items() if value.is_floating_point()}
        flipped = torch.rand(len(self.train.labels), device=self.device) < 0.5
        net.train()
        step = 0
        while step < (total if limit is None else min(limit, total)):
            epoch = step // per_epoch
            assert net.whitening.bias is not None
            net.whitening.bias.requires_grad_(epoch < settings.whitening_bias_epochs)
            images = self._augmented(flipped if epoch % 2 == 0 else ~flipped)
            for rows in torch.randperm(len(images), device=self.device)[
                : per_epoch * settings.batch_size
            ].split(settings.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * triangle(step, total)
                logits = net(images[rows]).float()
                loss = F.cross_entropy(
                    logits, self.train.labels[rows], label_smoothing=settings.label_smoothing, reduction="sum"
                )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                step += 1
                if step % 5 == 0:
                    look_ahead(net, slow, decay=0.95**5 * (step / total) ** 3)
                if step >= (total if limit is None else min(limit, total)):
                    break
        look_ahead(net, slow, decay=1.0)

    def _augmented(self, flip: Tensor) -> Tensor:
        """Return all images, the marked ones mirrored, each shifted by up to `shift` pixels over its reflection."""
        images, shift = self.train.images, self.settings.shift
        size, count = images.shape[-1], len(images)
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        padded = F.pad(images, (shift,) * 4, "reflect")
        moved = torch.randint(-shift, shift + 1, (count, 2), device=self.device)
        out = torch.empty_like(images)
        for down in range(-shift, shift + 1):
            for right in range(-shift, shift + 1):
                rows = (moved[:, 0] == down) & (moved[:, 1] == right)
                top, left = shift + down, shift + right
                out[rows] = padded[rows, :, top : top + size, left : left + size]
        return out

    @torch.no_grad()
    def _evaluate(self, net: Net) -> float:
        net.eval()
        hits = 0
        for images, labels in zip(self.test.images.split(2_000), self.test.labels.split(2_000), strict=True):
            padded, size = F.pad(images, (1,) * 4, "reflect"), images.shape[-1]
            shifted = (padded[:, :, :size, :size], padded[:, :, 2:, 2:])
            still = mirrored(net, images)
            moved = (mirrored(net, shifted[0]) + mirrored(net, shifted[1])) / 2
            hits += int(((still + moved).argmax(1) == labels).sum())
        return hits / len(self.test.labels)


def mirrored(net: Net, images: Tensor) -> Tensor:
    return (net(images).float() + net(images.flip(-1)).float()) / 2


def triangle(step: int, total: int) -> float:
    """Return the rate as a share of its peak: from 0.2 up to 1 at 23 % of the steps, and down to 0.07."""
    peak = int(0.23 * total)
    return 0.2 + 0.8 * step / peak if step < peak else 1 - 0.93 * (step - peak) / (total - peak)


@torch.no_grad()
def look_ahead(net: Net, slow: dict[str, Tensor], *, decay: float) -> None:
    """Move the slow weights towards the net's, and put them in its place; a decay of 1 only puts them there."""
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            slow[name].lerp_(value, 1 - decay)
            value.copy_(slow[name])
