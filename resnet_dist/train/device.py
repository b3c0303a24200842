"""Check that the device can do what the recipe asks, and set the switches of the process that it needs."""

from __future__ import annotations

import os
import shutil
from typing import Literal

import torch

from resnet_dist.config import Train
from resnet_dist.errors import RecipeError
from resnet_dist.world import World

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The compilers that torch.compile calls, as (environment variable, programs): a C++ compiler for CPU code, a C
# compiler for the code that launches GPU kernels.
COMPILERS = {"cpu": ("CXX", ("c++", "g++", "clang++")), "cuda": ("CC", ("cc", "gcc", "clang"))}


def prepare_device(train: Train, world: World) -> None:
    """Raise RecipeError for what this device cannot do; on a GPU set matmul precision and kernel selection."""
    device = world.device.type
    if train.precision == "fp16" and device != "cuda":
        raise RecipeError(f"train.precision='fp16' needs a GPU, and this is {device}; use bf16 or fp32")
    if train.sync_batch_norm and world.world_size > 1 and device != "cuda":
        raise RecipeError(
            f"train.sync_batch_norm=True with {world.world_size} ranks needs GPUs, and this is {device}: "
            "torch.nn.SyncBatchNorm works on no other device; set it to false, or use one rank"
        )
    if train.compile != "none" and not has_compiler(device):
        variable, names = COMPILERS[device]
        raise RecipeError(
            f"train.compile={train.compile!r} needs a compiler, and there is no {' or '.join(names)}, nor what "
            f"{variable} names; install one, or use train.compile='none'"
        )
    set_arithmetic(train, world.device)


def set_arithmetic(train: Train, device: torch.device) -> None:
    """On a GPU set the precision of fp32 products and the selection of kernels, as the recipe asks."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if train.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = train.tf32
        # Time the convolution kernels once per shape: the shapes of a run hardly change.
        torch.backends.cudnn.benchmark = True


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass in that precision; with fp32 it changes nothing."""
    return torch.autocast(device.type, AUTOCAST[precision], enabled=precision != "fp32")


def has_compiler(device: str) -> bool:
    """Report whether torch.compile finds a compiler for `device`, "cpu" or "cuda"."""
    variable, names = COMPILERS[device]
    return any(shutil.which(name) for name in (os.environ.get(variable), *names) if name)
