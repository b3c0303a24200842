"""The description of the machine that a figure was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from resnet_dist.system.cpus import cpu_count


def describe_machine(*, gpu: bool) -> str:
    """Return one line: the processor, the CPUs that this process may use, the GPUs, and the version of torch."""
    parts = [f"{_cpu_name()} ({cpu_count()} CPUs)"]
    if gpu:
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join([*parts, f"torch {torch.__version__}"])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # This is not Linux, or not x86.
        return platform.processor() or platform.machine()
