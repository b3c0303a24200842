"""What a recipe asks of the device: refused where it cannot be had, set where it is a switch of the process."""

from __future__ import annotations

import os
import shutil

import torch

from resnet_dist.config import Train
from resnet_dist.errors import RecipeError
from resnet_dist.world import World

# What torch.compile calls: a C++ compiler for its CPU code; on a GPU, a C compiler for what launches its kernels.
COMPILERS = {"cpu": ("CXX", ("c++", "g++", "clang++")), "cuda": ("CC", ("cc", "gcc", "clang"))}


def prepare_device(train: Train, world: World) -> None:
    """Raises RecipeError for what this device cannot do; sets how it multiplies and chooses kernels."""
    device = world.device.type
    if train.precision == "fp16" and device != "cuda":
        raise RecipeError(f"train.precision='fp16' needs a GPU, and this is {device}; use bf16 or fp32")
    if train.sync_batch_norm and world.world_size > 1 and device != "cuda":
        raise RecipeError(
            f"train.sync_batch_norm=True with {world.world_size} ranks needs GPUs, and this is {device}: "
            "torch.nn.SyncBatchNorm has no other; set it to false, or use one rank"
        )
    if train.compile != "none" and not has_compiler(device):
        variable, names = COMPILERS[device]
        raise RecipeError(
            f"train.compile={train.compile!r} needs a compiler, and there is no {' or '.join(names)}, nor what "
            f"{variable} names; install one, or use train.compile='none'"
        )
    if device == "cuda":
        torch.set_float32_matmul_precision("high" if train.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = train.tf32
        # Time the convolution kernels once for each shape: shapes of a run hardly change.
        torch.backends.cudnn.benchmark = True


def has_compiler(device: str) -> bool:
    """Whether torch.compile can make code for `device`, "cpu" or "cuda"."""
    variable, names = COMPILERS[device]
    return any(shutil.which(name) for name in (os.environ.get(variable), *names) if name)
