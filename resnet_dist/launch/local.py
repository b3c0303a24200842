"""Train as one rank in this process, without Ray and without a process group."""

from __future__ import annotations

from collections.abc import Callable

import torch

from resnet_dist.config import Recipe
from resnet_dist.errors import UserError
from resnet_dist.launch.attempt import Attempt, RankLauncher
from resnet_dist.launch.checkpoint_evaluator import catch_up_here
from resnet_dist.launch.rank import run_attempt
from resnet_dist.runs.folder import RunFolder
from resnet_dist.system.cpus import cpu_count
from resnet_dist.system.signals import StopRequest, handle_signals
from resnet_dist.train.loop import Outcome
from resnet_dist.world import World


def local_launcher(
    recipe: Recipe,
    *,
    gpu: bool | None,
    cpus: int | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> RankLauncher:
    """Return a launcher that trains `recipe` in this process.

    cpus: limit for the CPUs that it uses; None: all. gpu: None uses a GPU where there is one. report: receives what it does
    before training begins. Raises UserError where `gpu` is true and there is none.
    """
    if gpu is None:
        gpu = torch.cuda.is_available()
    if gpu and not torch.cuda.is_available():
        raise UserError("--gpu: this machine has no CUDA device that torch can use; use --cpu")

    def launch(folder: RunFolder) -> Outcome | None:
        own_cpus = min(cpu_count(), cpus or cpu_count())
        catch_up_here(recipe, folder, own_cpus, gpu=gpu, report=report)
        attempt = Attempt.of(recipe, folder, cpus=own_cpus)
        stop = StopRequest()
        with handle_signals(stop.request):
            return run_attempt(attempt, World.single(gpu=gpu), stop.requested, stop.expired)

    return launch
