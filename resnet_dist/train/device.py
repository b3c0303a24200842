"""Check that the device can do what the recipe asks, and set the switches of the process that it needs."""

from __future__ import annotations

import os
import shutil
from typing import Literal

import torch

from resnet_dist.config import Data, Train
from resnet_dist.errors import RecipeError, TrainingError, UserError
from resnet_dist.world import World

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The compilers that torch.compile calls, as (environment variable, programs): a C++ compiler for CPU code, a C
# compiler for the code that launches GPU kernels.
COMPILERS = {"cpu": ("CXX", ("c++", "g++", "clang++")), "cuda": ("CC", ("cc", "gcc", "clang"))}

# cuBLAS adds in an order that depends on what runs beside it, unless each stream has a workspace of a fixed size.
CUBLAS_VARIABLE, CUBLAS_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
OWN_MARK = "RESNET_DIST_CUBLAS_WORKSPACE"  # the value that CUBLAS_VARIABLE was given here, not by a person
NONDETERMINISTIC = " does not have a deterministic implementation"  # in an error of torch, after an operation


def prepare_device(train: Train, world: World, data: Data | None = None) -> None:
    """Raise RecipeError for what this device cannot do; on a GPU set matmul precision and kernel selection."""
    device = world.device.type
    if data is not None and data.decode == "gpu" and device != "cuda":
        raise RecipeError(f"data.decode='gpu' needs a CUDA device, and this is {device}; use data.decode=cpu")
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
        choose_kernels(deterministic=train.deterministic)


def choose_kernels(*, deterministic: bool) -> None:
    """Let CUDA take the fastest kernels, or those that compute the same bits each time. Call it before CUDA is used.

    Raises RecipeError where a variable of the shell prevents the latter.
    """
    workspace = os.environ.get(CUBLAS_VARIABLE)
    if not deterministic and workspace is not None and workspace == os.environ.get(OWN_MARK):
        # It was set here, for another training of this process or of its parent: take it back.
        del os.environ[CUBLAS_VARIABLE], os.environ[OWN_MARK]
    elif deterministic and workspace is None:
        os.environ[CUBLAS_VARIABLE] = os.environ[OWN_MARK] = CUBLAS_WORKSPACES[0]
    elif deterministic and workspace not in CUBLAS_WORKSPACES:
        raise RecipeError(
            f"train.deterministic=True needs {CUBLAS_VARIABLE}={' or '.join(CUBLAS_WORKSPACES)}, and it is "
            f"{workspace!r}; leave the variable out"
        )
    # Otherwise time the convolution kernels once per shape: the shapes of a run hardly change.
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)
    # It would fill memory that is written before anyone reads it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def chosen_precision(
    asked: Precision | None, trained: Precision, device: torch.device
) -> tuple[Precision, str | None]:
    """Return the precision of an evaluation, and a line where it is not the recipe's.

    asked: by the person; None: that of the training. Raises UserError for what the device cannot do.
    """
    if (asked or trained) != "fp16" or device.type == "cuda":
        return asked or trained, None
    if asked:
        raise UserError("--precision fp16 needs a GPU; use bf16 or fp32")
    return "fp32", "evaluated in fp32: the recipe's train.precision='fp16' needs a GPU"


def explain_nondeterminism(error: BaseException) -> TrainingError | None:
    """Return an error that names the field, where torch refuses an operation; None where `error` is another one."""
    operation, refusal, _ = str(error).partition(NONDETERMINISTIC)
    if not isinstance(error, RuntimeError) or not refusal:
        return None
    return TrainingError(
        f"train.deterministic=True: {operation} of torch {torch.__version__} has no deterministic form on this device; "
        "use train.deterministic=false"
    )


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass in that precision; with fp32 it changes nothing."""
    return torch.autocast(device.type, AUTOCAST[precision], enabled=precision != "fp32")


def has_compiler(device: str) -> bool:
    """Report whether torch.compile finds a compiler for `device`, "cpu" or "cuda"."""
    variable, names = COMPILERS[device]
    return any(shutil.which(name) for name in (os.environ.get(variable), *names) if name)
