"""The room for trials: how many run at the same time, and the CPUs and GPUs that each rank of them gets."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from resnet_dist.config import Recipe
from resnet_dist.data.shards.index import read_index
from resnet_dist.errors import UserError
from resnet_dist.launch.on_ray.placement.fit import Node, capacity, cpus_per_rank, describe
from resnet_dist.launch.on_ray.placement.nodes import nodes
from resnet_dist.model import build_model, count_parameters
from resnet_dist.sweep.request import SweepRequest
from resnet_dist.system.memory import available_memory
from resnet_dist.train.start.shapes import shapes_only

GIGABYTE = 1e9
RANK_BYTES = 1.0e9  # of a process with torch, MLflow, its loader and a small network
# Weights, gradients, momentum and average, and the copies of all but the gradients that a checkpoint is written from.
STATE_BYTES = 7 * 4  # for each parameter


@dataclass(frozen=True)
class Room:
    """The machines' part that each trial gets, and the number of trials at the same time."""

    concurrent: int
    workers: int  # ranks of a trial
    cpus: int  # of each rank
    gpu: bool  # of each rank
    memory: int = 1  # bytes of a trial with one rank, which Ray reserves on its node
    limit: str = ""  # the reason for fewer trials at the same time than there are CPUs or GPUs for

    def of_actor(self) -> dict[str, float]:
        """Return the resources of a trial's own process: with several ranks, these hold them in its place."""
        if self.workers > 1:
            return {"memory": 1}  # Bytes: Tune takes no process that holds nothing.
        return {"CPU": self.cpus, "memory": self.memory, **({"GPU": 1} if self.gpu else {})}


def find_room(request: SweepRequest, recipes: Sequence[Recipe]) -> Room:
    """Return the room on the connected cluster for trials of these recipes. Raises UserError where it is too small."""
    alive, workers = nodes(), request.workers
    gpu = sum(node.gpus for node in alive) > 0 if request.gpu is None else request.gpu
    num_fit = capacity(alive, 1, gpu=gpu) // workers
    wanted = request.concurrent or max(1, min(len(recipes), num_fit))
    if wanted > num_fit >= 1:
        each = f"{workers} rank(s) with a {'GPU' if gpu else 'CPU'} each"
        raise UserError(
            f"--concurrent {wanted}: each trial needs {each}, and {describe(alive)}; give {num_fit} or fewer"
        )
    free = [*map(free_memory, alive)]
    need = max(memory_of_rank(recipe, workers, gpu=gpu) for recipe in _different(recipes))
    num = sum(
        min(capacity([node], 1, gpu=gpu), int(has // need)) for node, has in zip(alive, free, strict=True)
    )
    concurrent, limit = min(wanted, max(1, num // workers)), ""
    if num // workers < wanted:
        waits = "the others wait" if num >= workers else "one is tried alone"
        limit = (
            f"memory for {num // workers} of {wanted} trial(s) at a time: each takes some {need * workers / GIGABYTE:.1f} GB, "
            f"and {sum(free) / GIGABYTE:.1f} GB are free; {waits}"
        )
    cpus = cpus_per_rank(alive, concurrent * workers, gpu=gpu)
    # A trial that no node has so much for is tried on the largest.
    return Room(concurrent, workers, cpus, gpu, int(min(need, max(free))), limit)


def _different(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Return recipes that differ in what takes memory."""
    return [*{one.model.model_dump_json() + one.data.model_dump_json(): one for one in recipes}.values()]


def free_memory(node: Node) -> float:
    """Return the bytes of memory for ranks on a node: what Ray may use, on this machine at most what is free."""
    return min(node.memory, available_memory()) if node.host == platform.node() else node.memory


def memory_of_rank(recipe: Recipe, workers: int, *, gpu: bool) -> float:
    """Return the bytes of host memory that a rank of a trial takes, about: a trial that needs more may be killed."""
    data = recipe.data
    index = read_index(data.train)
    with shapes_only():  # The weights themselves may take gigabytes, and seconds.
        network = build_model(
            **recipe.model.options(), in_channels=data.channels, num_classes=len(index.classes)
        )
    samples = data.micro_batch_size or -(-data.global_batch_size // workers)
    pixels = data.channels * data.image_size**2
    cached = index.num_samples * pixels if data.cache == "ram" or (data.cache == "device" and not gpu) else 0
    # On a GPU, state and activations are there; the copies of the state for checkpoints are not.
    activations = 0 if gpu else samples * activation_bytes(network, data.channels, data.image_size)
    return RANK_BYTES + STATE_BYTES * count_parameters(network) + cached + activations


def activation_bytes(network: torch.nn.Module, channels: int, size: int) -> int:
    """Return the bytes that the layers of a network put out for one image, which the backward pass needs."""
    total = 0

    def count(layer: torch.nn.Module, inputs: object, output: object) -> None:
        nonlocal total
        if isinstance(output, torch.Tensor) and not [*layer.children()]:
            total += output.numel() * output.element_size()

    for layer in network.modules():
        layer.register_forward_hook(count)
    # Evaluation: in training, batch norm refuses a single image of which one pixel is left.
    with torch.no_grad():
        network.to("meta").eval()(torch.empty(1, channels, size, size, device="meta"))
    return total
