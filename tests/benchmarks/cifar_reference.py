"""Accuracy of ResNet-20 on CIFAR-10, ours against a plain PyTorch loop: equal within noise, over several seeds.

    python tests/benchmarks/cifar_reference.py IMAGES [--train 4000 --test 2000 --epochs 10 --seeds 3]

IMAGES is a tar of JPEG files, train/CLASS/NAME and test/CLASS/NAME. --train and --test images are taken from it, the
same number of each class. Ours is the command line: `prepare` and `train --local`. The reference shares only those
files and the constants below with it: it reads with ImageFolder, augments with torchvision, and has its own model,
optimizer groups, schedule and evaluation. The exit code is 1 where the means differ by more than two standard errors
and by more than one percentage point.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import datasets, transforms

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CLASSES = 10
PARAMETERS = 269_722  # ResNet-20 with option A has so many, He et al. 2015
BATCH, LR, MOMENTUM, WEIGHT_DECAY = 128, 0.1, 0.9, 1e-4


def extract_balanced(archive: Path, folder: Path, counts: dict[str, int]) -> None:
    """Extract the first files of every class, `counts[split]` in all of each split."""
    taken: Counter[str] = Counter()
    with tarfile.open(archive) as tar:
        for member in tar:
            split, _, rest = member.name.partition("/")
            kind = f"{split}/{rest.partition('/')[0]}"
            if member.isfile() and taken[kind] < counts.get(split, 0) // CLASSES:
                tar.extract(member, folder, filter="data")
                taken[kind] += 1
    for split, count in counts.items():
        found = sum(number for kind, number in taken.items() if kind.startswith(f"{split}/"))
        if found != count // CLASSES * CLASSES:
            raise SystemExit(f"{archive} has {found} of the {count} images wanted in {split}/")


# --- the reference: plain PyTorch ---


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut takes every other pixel and pads new channels with zeros (option A)."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        stride = 2 if outside != inside else 1
        self.layers = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.new_channels = outside - inside

    def forward(self, x: Tensor) -> Tensor:
        skip = x
        if self.new_channels:
            skip = x[:, :, ::2, ::2]
            zeros = skip.new_zeros(len(x), self.new_channels // 2, *skip.shape[2:])
            skip = torch.cat([zeros, skip, zeros], dim=1)
        return torch.relu(self.layers(x) + skip)


def resnet20() -> nn.Sequential:
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        *(Block(inside, outside) for inside, outside in zip(widths[:-1], widths[1:], strict=True)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def reference_accuracy(folder: Path, epochs: int, seed: int) -> float:
    """Train on train/, and return the top-1 accuracy on test/ after the last epoch."""
    torch.manual_seed(seed)
    random.seed(seed)
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    augment = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), normalize]
    )
    train, test = (list(datasets.ImageFolder(str(folder / split))) for split in ("train", "test"))
    model = resnet20().to(memory_format=torch.channels_last)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    kernels = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD(
        [{"params": kernels, "weight_decay": WEIGHT_DECAY}, {"params": rest}],
        lr=LR,
        momentum=MOMENTUM,
        nesterov=True,
    )
    steps_per_epoch = len(train) // BATCH
    warmup, total = steps_per_epoch, epochs * steps_per_epoch

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for _ in range(epochs):
        order = torch.randperm(len(train)).tolist()
        for low in range(0, steps_per_epoch * BATCH, BATCH):
            chosen = [train[i] for i in order[low : low + BATCH]]
            images = torch.stack([augment(image) for image, _ in chosen])
            labels = torch.tensor([label for _, label in chosen])
            loss = nn.functional.cross_entropy(
                model(images.contiguous(memory_format=torch.channels_last)), labels
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    correct = 0
    with torch.no_grad():
        for low in range(0, len(test), 500):
            chosen = test[low : low + 500]
            logits = model(torch.stack([normalize(image) for image, _ in chosen]))
            correct += int((logits.argmax(dim=1) == torch.tensor([label for _, label in chosen])).sum())
    return correct / len(test)


# --- ours: the command line ---


def command(*arguments: str) -> None:
    program = "import sys; from resnet_dist.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"resnet-dist {' '.join(arguments)}\n{done.stdout}{done.stderr}")


def write_recipe(path: Path, data: Path, epochs: int) -> None:
    from resnet_dist import Data, Model, Optim, Recipe, Schedule, Train
    from resnet_dist.model import build_model, count_parameters

    assert (
        count_parameters(build_model("resnet20", in_channels=3, num_classes=10, shortcut="zero-pad"))
        == PARAMETERS
    )
    recipe = Recipe(
        name="cifar-reference",
        data=Data(
            train=str(data / "train"),
            eval=str(data / "eval"),
            image_size=32,
            mean=MEAN,
            std=STD,
            global_batch_size=BATCH,
            crop="pad-crop",
            pad=4,
            flip=True,
            cache="ram",
        ),
        model=Model(name="resnet20", shortcut="zero-pad"),
        optim=Optim(lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY),
        schedule=Schedule(decay="cosine", warmup="1 epochs"),
        train=Train(length=f"{epochs} epochs", eval_every="0 steps", checkpoint_every="0 steps"),
    )
    path.write_text(recipe.to_json())


def our_accuracy(recipe: Path, output: Path, seed: int) -> float:
    name = f"seed-{seed}"
    command(
        *("train", str(recipe), "--local", "--cpu", "--set", f"seed={seed}", "--name", name),
        *("--output", str(output)),
    )
    entries = map(json.loads, (output / "runs" / name / "spool.jsonl").read_text().splitlines())
    found = [entry["metrics"]["eval/top1"] for entry in entries if "eval/top1" in entry.get("metrics", {})]
    return float(found[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    for name, default in (("--train", 4000), ("--test", 2000), ("--epochs", 10), ("--seeds", 3)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    ours, reference = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images, shards, recipe = folder / "images", folder / "shards", folder / "recipe.json"
        extract_balanced(options.images, images, {"train": options.train, "test": options.test})
        command("prepare", str(images), str(shards))
        write_recipe(recipe, shards, options.epochs)
        for seed in range(options.seeds):
            times = [time.monotonic()]
            ours.append(our_accuracy(recipe, folder / "output", seed))
            times.append(time.monotonic())
            reference.append(reference_accuracy(images, options.epochs, seed))
            times.append(time.monotonic())
            seconds = [end - begin for begin, end in pairwise(times)]
            print(
                f"seed {seed}: ours {ours[-1]:.2%} in {seconds[0]:.0f} s, reference {reference[-1]:.2%} in {seconds[1]:.0f} s",
                flush=True,
            )
    report(ours, reference, options)


def report(ours: list[float], reference: list[float], options: argparse.Namespace) -> None:
    from resnet_dist.bench.machine import describe_machine

    means = [statistics.mean(values) for values in (ours, reference)]
    spreads = [statistics.stdev(values) for values in (ours, reference)]
    difference = means[0] - means[1]
    error = math.sqrt(sum(spread**2 for spread in spreads) / options.seeds)
    within = abs(difference) <= max(2 * error, 0.01)
    print(f"machine   {describe_machine(gpu=False)}")
    print(
        f"setting   {options.train} images, {options.epochs} epochs, {options.test} test images, n={options.seeds}"
    )
    for name, mean, spread in zip(("ours", "reference"), means, spreads, strict=True):
        print(f"{name:<9} {mean:.2%}, standard deviation {spread:.2%}")
    print(
        f"ours - reference = {difference:+.2%}, standard error {error:.2%}: {'within' if within else 'beyond'} noise"
    )
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
