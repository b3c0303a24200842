"""Build a network from its name and options, and reject with an explanation what cannot work."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import nn

from .fast import MIN_IMAGE_SIZE, FastResNet
from .resnet import ResNet
from .shortcuts import ShortcutKind
from .table import MODELS, FastArchitecture, Options, StemKind, WhiteningKind

# The options that a fast net reads.
_OF_FAST = ("norm_eps", "whitening")


def build_model(
    name: str, *, in_channels: int, num_classes: int, seed: int | None = None, **options: Any
) -> nn.Module:
    """Return the network called `name` in MODELS; `options` are the fields of Options.

    With a seed, its initial weights are the same on every rank, and torch's global generator stays as it was.
    Raises ValueError, in one sentence, for an unknown name and for options that do not fit.
    """
    chosen = Options(**options)
    check_model(name, chosen)
    architecture = MODELS[name]
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        if isinstance(architecture, FastArchitecture):
            model: nn.Module = FastResNet(architecture, in_channels=in_channels, num_classes=num_classes)
        else:
            model = ResNet(architecture, chosen, in_channels=in_channels, num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = chosen.norm_eps
    return model


def check_model(name: str, options: Options, image_size: int | None = None) -> None:
    """Raise ValueError, naming the recipe's fields, unless such a model can be built and trained.

    `image_size` is the smallest height and width that the net will see, in pixels; None skips that check.
    """
    if name not in MODELS:
        raise ValueError(f"model.name={name!r}: use one of {', '.join(MODELS)}")
    for field, value, known in (
        ("shortcut", options.shortcut, get_args(ShortcutKind)),
        ("stem", options.stem, get_args(StemKind)),
        ("whitening", options.whitening, get_args(WhiteningKind)),
    ):
        if value not in known:
            raise ValueError(f"model.{field}={value!r}: use one of {', '.join(known)}")
    if not options.norm_eps > 0:
        raise ValueError(f"model.norm_eps={options.norm_eps}: use a number above 0, such as 1e-5")
    if has_whitening(name):
        _check_fast(name, options, image_size)
    elif options.whitening != Options().whitening:
        raise ValueError(
            f"model.whitening={options.whitening!r}: {name} has no whitening layer; leave it out, or use "
            "model.name=resnet9_fast"
        )
    if options.shortcut == "none" and options.zero_init:
        raise ValueError(
            "model.zero_init=true with model.shortcut='none': a plain block whose last layer is zero passes "
            "nothing on; use zero_init=false, or another shortcut"
        )
    if options.shortcut == "none" and options.stochastic_depth:
        raise ValueError(
            f"model.stochastic_depth={options.stochastic_depth} with model.shortcut='none': a plain block that "
            "is dropped passes nothing on; use stochastic_depth=0, or another shortcut"
        )


def has_whitening(name: str) -> bool:
    """Report whether the first layer of the network is computed from images: see fast.py."""
    return isinstance(MODELS.get(name), FastArchitecture)


def _check_fast(name: str, options: Options, image_size: int | None) -> None:
    default = Options()
    for field, value in vars(options).items():
        if field not in _OF_FAST and value != getattr(default, field):
            raise ValueError(
                f"model.{field}={value!r}: {name} is a fixed net; use {getattr(default, field)!r}, or another "
                "model.name"
            )
    if image_size is not None and image_size < MIN_IMAGE_SIZE:
        raise ValueError(
            f"model.name={name!r} halves its images three times, and {image_size} pixels are too few for that "
            "(the smallest of data.image_size, data.eval_size and data.train_sizes); "
            f"use {MIN_IMAGE_SIZE} or more, or another model.name"
        )


def check_batch_norm(name: str, options: Options, image_size: int, num_samples: int) -> None:
    """Raise ValueError where batch norm would see one value per channel in training, whose variance is zero.

    `image_size` is in pixels; `num_samples` is the number of images in one forward pass of one rank.
    """
    if num_samples == 1 and final_map_size(name, options, image_size) == 1:
        raise ValueError(
            f"model.name={name!r} brings images of {image_size} pixels (the smallest of data.image_size and "
            "data.train_sizes) down to 1x1, and a forward pass has one image (data.micro_batch_size, or "
            "data.global_batch_size over the ranks): batch norm needs several values; "
            "use larger images, or more of them"
        )


def final_map_size(name: str, options: Options, image_size: int) -> int:
    """Return the height and width of the last stage's output, in pixels."""
    architecture = MODELS[name]
    if isinstance(architecture, FastArchitecture):
        return (image_size - 1) // 8
    stem = architecture.stem if options.stem == "auto" else options.stem
    halvings = len(architecture.blocks) - 1 + (0 if stem == "cifar" else 2)
    for _ in range(halvings):
        image_size = (image_size + 1) // 2
    return image_size


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable scalars of `model`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
