"""Profile some steps: a trace of what CPU and GPU did in them, written beside the run. Nothing is added to other steps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from resnet_dist.config.profile import ProfiledSteps
from resnet_dist.data.batches.loader import Batch
from resnet_dist.train.step.gradient_norms import GradientNorms

NUM_ROWS = 40  # operators in the table


class BatchSource(Protocol):
    """The batches of a rank."""

    @property
    def num_decoded_on_cpu(self) -> int:
        """The images so far that the GPU could not decode."""

    def batch_at(self, step: int) -> Batch: ...


class Step(Protocol):
    """One update of the weights."""

    gradient_norms: GradientNorms | None

    def __call__(self, batch: Batch) -> None: ...


class StepProfile:
    """Stands between the loop and the loader and step of a rank, and records the steps that were asked for.

    The recording begins before the first of their batches is waited for, and ends after the last of their updates; of a
    run that ends before, with the run. write: gets the name and the content of each file. Whatever fails is reported,
    and does not end the training.
    """

    def __init__(
        self,
        steps: ProfiledSteps,
        loader: BatchSource,
        train_step: Step,
        device: torch.device,
        write: Callable[[str, bytes], None],
        report: Callable[[str], None],
    ) -> None:
        self._steps, self._loader, self._train_step = steps, loader, train_step
        self._write, self._report = write, report
        self.gradient_norms = train_step.gradient_norms
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = None
        self._first = self._step = 0

    def batch_at(self, step: int) -> Batch:
        """Return the batch after `step` completed steps."""
        self._step = step + 1
        if self._profile is None and self._steps.start <= self._step <= self._steps.stop:
            self._first = self._step
            self._profile = profile(activities=self._activities)
            self._profile.start()
        with record_function(f"batch of step {self._step}"):
            return self._loader.batch_at(step)

    @property
    def num_decoded_on_cpu(self) -> int:
        return self._loader.num_decoded_on_cpu

    def __call__(self, batch: Batch) -> None:
        with record_function(f"step {self._step}"):
            self._train_step(batch)
        if self._step == self._steps.stop:
            self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def _finish(self) -> None:
        recorded, self._profile = self._profile, None
        if recorded is None:
            return
        try:
            recorded.stop()
            self._keep(recorded)
        except Exception as error:  # Such as a full disk, or a defect of the profiler
            self._report(
                f"the profile of steps {self._steps} was not written: {type(error).__name__}: {error}"
            )

    def _keep(self, recorded: profile) -> None:
        name = f"steps-{self._first}-{self._step}"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.json.gz"
            recorded.export_chrome_trace(str(path))
            self._write(path.name, path.read_bytes())
        times = recorded.key_averages()
        key = "self_device_time_total" if ProfilerActivity.CUDA in self._activities else "self_cpu_time_total"
        self._write(f"{name}.txt", f"{times.table(sort_by=key, row_limit=NUM_ROWS)}\n".encode())
