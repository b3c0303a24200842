"""A network by its name. The one place where names and options meet; what cannot work together is refused."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import nn

from .fast import SMALLEST_IMAGE, FastResNet
from .resnet import ResNet
from .shortcuts import ShortcutKind
from .table import MODELS, FastArchitecture, Options, StemKind


def build_model(
    name: str, *, in_channels: int, num_classes: int, seed: int | None = None, **options: Any
) -> nn.Module:
    """The network called `name` in MODELS, with `options` as in Options.

    With a seed its weights are the same on every rank and machine. Raises ValueError, in one sentence, for an
    unknown name and for options that do not fit.
    """
    chosen = Options(**options)
    check_model(name, chosen)
    architecture = MODELS[name]
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        if isinstance(architecture, FastArchitecture):
            return FastResNet(architecture, in_channels=in_channels, num_classes=num_classes)
        return ResNet(architecture, chosen, in_channels=in_channels, num_classes=num_classes)


def check_model(name: str, options: Options, image_size: int | None = None) -> None:
    """Raise ValueError, naming the fields as a recipe does, unless such a model can be built and trained."""
    if name not in MODELS:
        raise ValueError(f"model.name={name!r}: use one of {', '.join(MODELS)}")
    for field, value, known in (
        ("shortcut", options.shortcut, get_args(ShortcutKind)),
        ("stem", options.stem, get_args(StemKind)),
    ):
        if value not in known:
            raise ValueError(f"model.{field}={value!r}: use one of {', '.join(known)}")
    if isinstance(MODELS[name], FastArchitecture):
        _check_fast(name, options, image_size)
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


def _check_fast(name: str, options: Options, image_size: int | None) -> None:
    default = Options()
    for field, value in vars(options).items():
        if value != getattr(default, field):
            raise ValueError(
                f"model.{field}={value!r}: {name} is a fixed net; use {getattr(default, field)!r}, or another "
                "model.name"
            )
    if image_size is not None and image_size < SMALLEST_IMAGE:
        raise ValueError(
            f"model.name={name!r} halves its images three times, and {image_size} pixels are too few for that "
            f"(the least of data.image_size, data.eval_size and data.train_sizes); use {SMALLEST_IMAGE} or more, or "
            "another model.name"
        )


def check_batch_norm(name: str, options: Options, image_size: int, samples: int) -> None:
    """Raise ValueError where batch norm would see one value per channel in training: its variance is zero."""
    if samples == 1 and final_map_size(name, options, image_size) == 1:
        raise ValueError(
            f"model.name={name!r} brings images of {image_size} pixels (the least of data.image_size and "
            "data.train_sizes) down to 1x1, and a forward pass has one image (data.micro_batch_size, or "
            "data.global_batch_size over the ranks): batch norm needs several values; use larger images, or more of them"
        )


def final_map_size(name: str, options: Options, image_size: int) -> int:
    """Height and width of what the last stage returns."""
    architecture = MODELS[name]
    if isinstance(architecture, FastArchitecture):
        return (image_size - 1) // 8
    stem = architecture.stem if options.stem == "auto" else options.stem
    halvings = len(architecture.blocks) - 1 + (0 if stem == "cifar" else 2)
    for _ in range(halvings):
        image_size = (image_size + 1) // 2
    return image_size


def count_parameters(model: nn.Module) -> int:
    """Trainable scalars of `model`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
