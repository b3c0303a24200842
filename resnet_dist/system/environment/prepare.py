"""Check and prepare the environment of this process: before every command, and before a training."""

from __future__ import annotations

from enum import Enum

from resnet_dist.system.cpus import cpu_count, limit_spinning
from resnet_dist.system.environment.folders import use_home, use_ray_folder, use_temporary
from resnet_dist.system.environment.limits import check_limits, check_processes_of_group
from resnet_dist.system.environment.network import (
    check_interface_of_gloo,
    check_interface_of_nccl,
    check_loopback,
)
from resnet_dist.system.environment.torchrun import check_torchrun
from resnet_dist.system.environment.variables import (
    forgive_warnings,
    refuse_wrong_values,
    remove_wrong_values,
    report_hidden_gpus,
)


class Ranks(Enum):
    """The place of the ranks of a training."""

    HERE = "one in this process"
    TORCHRUN = "this process is one of them"
    RAY_HERE = "in a Ray cluster of this machine"
    CLUSTER = "in a running Ray cluster"


def prepare_command() -> list[str]:
    """Check what every command needs; return the lines that a person should read.

    Raises UserError for what cannot be mended here. Call it before a large library is imported: those read variables.
    """
    checks = (
        check_torchrun,
        forgive_warnings,
        remove_wrong_values,
        refuse_wrong_values,
        use_temporary,
        use_home,
    )
    limit_spinning()
    return [line for check in checks for line in check()]


def prepare_training(ranks: Ranks, *, num_workers: int = 1, gpu: bool | None = None) -> list[str]:
    """Check what a training needs in addition to `prepare_command`; return the lines that a person should read.

    num_workers: ranks under Ray. gpu: None uses GPUs where there are any. Raises UserError.
    """
    ray_workers = max(cpu_count(), num_workers) if ranks is Ranks.RAY_HERE else 0
    lines = check_limits(ray_workers) + check_processes_of_group(ray_workers)
    if ranks is not Ranks.CLUSTER:
        lines += report_hidden_gpus(gpu=gpu)
    if ranks in (Ranks.TORCHRUN, Ranks.RAY_HERE):
        lines += check_interface_of_gloo() + check_interface_of_nccl()
    if ranks is Ranks.RAY_HERE:
        lines += check_loopback() + use_ray_folder()
    return lines
