"""The room for trials: how many run at the same time, and the CPUs and GPUs that each rank of them gets."""

from __future__ import annotations

from dataclasses import dataclass

from resnet_dist.errors import UserError
from resnet_dist.launch.on_ray.placement.fit import capacity, cpus_per_rank, describe
from resnet_dist.launch.on_ray.placement.nodes import nodes
from resnet_dist.sweep.request import SweepRequest


@dataclass(frozen=True)
class Room:
    """The machines' part that each trial gets, and the number of trials at the same time."""

    concurrent: int
    workers: int  # ranks of a trial
    cpus: int  # of each rank
    gpu: bool  # of each rank

    def of_actor(self) -> dict[str, float]:
        """Return the resources of a trial's own process: with several ranks, these hold them in its place."""
        if self.workers > 1:
            return {"memory": 1}  # Bytes: Tune takes no process that holds nothing.
        return {"CPU": self.cpus, "GPU": 1} if self.gpu else {"CPU": self.cpus}


def find_room(request: SweepRequest, num_trials: int) -> Room:
    """Return the room on the connected cluster for so many trials. Raises UserError where it is too small."""
    alive, workers = nodes(), request.workers
    gpu = sum(node.gpus for node in alive) > 0 if request.gpu is None else request.gpu
    num_fit = capacity(alive, 1, gpu=gpu) // workers
    concurrent = request.concurrent or max(1, min(num_trials, num_fit))
    if concurrent > num_fit >= 1:
        each = f"{workers} rank(s) with a {'GPU' if gpu else 'CPU'} each"
        raise UserError(
            f"--concurrent {concurrent}: each trial needs {each}, and {describe(alive)}; give {num_fit} or fewer"
        )
    return Room(concurrent, workers, cpus_per_rank(alive, concurrent * workers, gpu=gpu), gpu)
