"""Snapshots: a state copied to host memory, so that training continues while it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_dist.errors import TrainingError
from resnet_dist.runs.evaluation_results import AWAITS
from resnet_dist.train.checkpoint.folder import Tensors
from resnet_dist.train.state.train_state import TrainState


class CheckpointFailed(TrainingError):
    """A checkpoint that could not be written."""


@dataclass(frozen=True)
class Snapshot:
    """A state at one step, in host memory."""

    tensors: Tensors
    scalars: dict[str, Any]
    copied: torch.cuda.Event | None  # on a GPU: recorded after the copies
    must_be_written: bool  # the best so far, or to be evaluated: no later one may replace it


def take_snapshot(state: TrainState, buffers: Tensors, *, awaits_evaluation: bool = False) -> Snapshot:
    """Copy a state into `buffers`, and create those that are missing.

    On a GPU the copies into pinned memory are queued after the step that made the state and before the one that
    changes it: the host continues at once, and the device is delayed by the transfer alone.
    """
    on_gpu = False
    tensors: Tensors = {}
    for file, group in state.tensors().items():
        own = buffers.setdefault(file, {})
        tensors[file] = {}
        for name, value in group.items():
            value = value.detach()
            buffer = own.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                # Keep the original's memory layout, so that the copy is one block; the writer makes it contiguous.
                buffer = own[name] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            tensors[file][name] = buffer.copy_(value, non_blocking=True)
            on_gpu = on_gpu or value.is_cuda
    copied = None
    if on_gpu:
        copied = torch.cuda.Event()
        copied.record()
    scalars = state.scalars() | ({AWAITS: True} if awaits_evaluation else {})
    return Snapshot(tensors, scalars, copied, must_be_written=state.is_best() or awaits_evaluation)


def refuse_not_finite(snapshot: Snapshot) -> None:
    """Raise CheckpointFailed where a tensor is not finite: gradients may ruin weights though the loss is finite."""
    for file, group in snapshot.tensors.items():
        for name, tensor in group.items():
            if file != "meter" and not _is_finite(tensor):  # the guard has checked the meter's sums
                raise CheckpointFailed(
                    f"the checkpoint of step {snapshot.scalars['step']} was not written: {name} of "
                    f"{file}.safetensors holds values that are not finite"
                )


def _is_finite(tensor: Tensor) -> bool:
    # A finite sum proves that all values are finite, at once. Any other sum may be an overflow: test every value.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
