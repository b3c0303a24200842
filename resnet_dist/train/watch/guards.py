"""Stop a run that cannot succeed, and name what to change: ranks that differ, losses, bad samples, memory."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from resnet_dist.config import Recipe
from resnet_dist.data.shards.index import Index
from resnet_dist.errors import Diverged, TrainingError
from resnet_dist.order.samples import Order
from resnet_dist.order.shares import Share
from resnet_dist.train.state.meter import NotFinite
from resnet_dist.train.state.train_state import TrainState
from resnet_dist.world import World

MAX_LISTED = 20  # samples named in one message


def check_agreement(
    recipe: Recipe, indexes: tuple[Index, Index], world: World, report: Callable[[str], None]
) -> None:
    """Raise TrainingError where ranks see different recipes, data sets or devices. A collective.

    Such ranks would train nonsense. Versions that differ are only reported.
    """
    required = {
        "recipe": recipe.digest(),
        "training index": indexes[0].digest(),
        "evaluation index": indexes[1].digest(),
        "kind of device": world.device.type,
    }
    expected = {"Python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for rank, (theirs, versions) in enumerate(world.gather((required, expected))):
        different = [name for name in required if required[name] != theirs.get(name)]
        if different:
            raise TrainingError(f"ranks {world.rank} and {rank} differ in their {', '.join(different)}")
        for name, version in versions.items():
            if version != expected[name]:
                report(f"rank {rank} has {name} {version}, rank {world.rank} has {expected[name]}")


@dataclass(frozen=True)
class Guard:
    """The checks that stop a run, where the sums of all ranks are known: at log lines, evaluations and checkpoints.

    All ranks hold the same sums, so all raise TrainingError together.
    """

    recipe: Recipe
    index: Index
    order: Order
    world_size: int

    def check_length(self, state: TrainState, total_steps: int) -> None:
        if state.step > total_steps:
            raise TrainingError(
                f"train.length={self.recipe.train.length!r} ends at step {total_steps}, but the run is at step "
                f"{state.step} already; give a longer one"
            )

    def check_losses(self, state: TrainState) -> None:
        """Raise Diverged where the last `Meter.gather` or `Meter.flush` found a loss that is not finite."""
        if state.meter.not_finite is not None:
            step = state.step - state.meter.not_finite.steps_ago
            raise Diverged(
                f"the training loss is not finite at step {step}, first {self.describe(state.meter.not_finite, step)}: "
                f"{self.advice()}; the last checkpoint before it is kept"
            )

    def check_evaluation(self, metrics: Mapping[str, float], step: int) -> None:
        bad, limit = metrics["eval/bad_samples"], self.recipe.data.max_bad_fraction
        fraction = bad / (bad + metrics["eval/samples"])
        if fraction > limit:
            raise TrainingError(
                f"{bad:.0f} samples ({fraction:.2%}) could not be decoded in the evaluation of step {step}, more than "
                f"data.max_bad_fraction={limit} allows"
            )
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise Diverged(
                    f"{name} is {value} in the evaluation of step {step}: {self.advice()}; the last checkpoint "
                    "is kept"
                )

    def check_samples(self, state: TrainState, bad: Sequence[str]) -> None:
        fraction = state.bad_samples / (state.step * self.recipe.data.global_batch_size)
        if fraction > self.recipe.data.max_bad_fraction:
            raise TrainingError(
                f"{state.bad_samples} samples ({fraction:.2%}) could not be decoded by step {state.step}, more "
                f"than data.max_bad_fraction={self.recipe.data.max_bad_fraction} allows"
                + (f"; the first is {bad[0]}" if bad else "")
            )

    def advice(self) -> str:
        return (
            f"lower optim.lr={self.recipe.optim.lr} or give a longer "
            f"schedule.warmup={self.recipe.schedule.warmup!r}, under a new --name"
        )

    def describe(self, where: NotFinite, step: int) -> str:
        """Return the rank, the micro-batch and its samples, as text. `step` counts from one: it is completed."""
        ids_B = Share.of(self.order, self.recipe.data, where.rank, self.world_size).ids_at(step - 1)
        size = self.recipe.data.micro_batch_size or len(ids_B)
        ids = ids_B[where.micro_batch * size : (where.micro_batch + 1) * size].tolist()
        named = ", ".join(self.index.place(sample_id) for sample_id in ids[:MAX_LISTED])
        more = f" and {len(ids) - MAX_LISTED} more" if len(ids) > MAX_LISTED else ""
        return f"on rank {where.rank} in micro-batch {where.micro_batch} (samples {named}{more})"


def out_of_memory(error: BaseException, recipe: Recipe, world: World) -> TrainingError | None:
    """Return an error that names the fields to lower, where `error` is about memory; None where it is not."""
    data, train = recipe.data, recipe.train
    samples = data.micro_batch_size or data.global_batch_size // world.world_size
    smaller = f"set data.micro_batch_size to less than {samples}, which changes what batch norm sees"
    if isinstance(error, torch.OutOfMemoryError):
        hints = [smaller]
        if train.precision == "fp32":
            hints.append("use train.precision=bf16")
        if data.cache == "device":
            hints.append("use data.cache=ram")
        return TrainingError(
            f"rank {world.rank} ran out of memory on {world.device} ({_first_sentence(error)}): {'; or '.join(hints)}"
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        hints = [
            f"lower data.prefetch_bytes={data.prefetch_bytes}, data.loader_workers={data.loader_workers}"
        ]
        if data.cache == "ram":
            hints.append("use data.cache=none")
        if world.device.type == "cpu":
            hints.append(smaller)
        detail = f" ({_first_sentence(error)})" if str(error) else ""
        return TrainingError(f"rank {world.rank} ran out of host memory{detail}: {'; or '.join(hints)}")
    return None


def _first_sentence(error: BaseException) -> str:
    text = str(error)
    text = text[text.find("DefaultCPUAllocator") :] if "DefaultCPUAllocator" in text else text
    return text.split(". ")[0].splitlines()[0].rstrip(".")
