"""The process that Ray Train starts for a rank: it holds the rank's place in the cluster.

Neither it nor Ray Train's controller imports torch, which takes seconds: the controller starts before all ranks do.
"""

from __future__ import annotations

import importlib
import os
import platform
import signal
import socket
import sys
from typing import Any

import ray
import ray.train
import ray.util
from ray.train.backend import Backend, BackendConfig

from resnet_dist.launch.preload.client import RANK, Died, Unavailable, run_rank
from resnet_dist.launch.preload.wire import NOTES
from resnet_dist.launch.start_times import PROCESSES, process_start
from resnet_dist.system.cpus import limit_spinning
from resnet_dist.system.signals import limit_exit

ADDRESS_VARIABLE, PORT_VARIABLE = "MASTER_ADDR", "MASTER_PORT"  # where the ranks meet
ORPHAN_SECONDS = 60.0  # after which the process of a rank that has failed ends by itself
GPUS_VARIABLE = "CUDA_VISIBLE_DEVICES"


class MeetingPoint(Backend):
    """Chooses the address where the ranks meet; they set up their process group themselves."""

    share_cuda_visible_devices = True  # NCCL copies between GPUs of one node that both ranks see.

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Choose a free port on the node of rank 0, and send its address to all ranks."""
        address, port = worker_group.execute_single(0, _free_address)
        worker_group.execute(_meet_at, address, port)


class MeetingConfig(BackendConfig):
    """Names the class above to Ray Train."""

    @property
    def backend_cls(self) -> type[Backend]:
        return MeetingPoint


def rank_main(orders: dict[str, Any]) -> dict[str, Any]:
    """Train as the rank that this process was started for; return the fields of its Outcome.

    The rank is a process of its own, which ends with this one, and this one with it.
    """
    orders = _complete(orders)
    try:
        return _run(orders)
    except Died as death:
        print(death, file=sys.stderr, flush=True)
        # Ray then knows of the death, and reports it with host and cause as that of any other process.
        os.kill(os.getpid(), signal.SIGKILL)
        raise
    except BaseException:
        # Ray ends this process in seconds, unless its controller is dead or out of reach.
        limit_exit(ORPHAN_SECONDS, 1)
        raise


def _run(orders: dict[str, Any]) -> dict[str, Any]:
    """Train in a copy of a process that has imported already; in this process where there can be none."""
    limit_spinning()  # A cluster that `ray start` made has not called it.
    if orders["preload"]:
        try:
            return run_rank(RANK, orders, _key(orders))
        except Unavailable as error:
            line = f"rank {orders['rank']} on {platform.node()} imports for itself: {error}"
            print(line, file=sys.stderr, flush=True)
            # The driver shows this; the output of this process is in Ray's own logs alone.
            orders[NOTES] = {f"imports-{orders['node']}": line}
    module, _, name = RANK.partition(":")
    outcome: dict[str, Any] = getattr(importlib.import_module(module), name)(orders)
    return outcome


def _key(orders: dict[str, Any]) -> str:
    """Return the name of what imports for this rank: of a run, a node, and all that is read when it imports."""
    if orders["imported"]:
        return str(orders["imported"])
    attempt = orders["attempt"]
    return "\n".join([attempt["folder"], attempt["holder"], str(attempt["cpus"]), orders["node"]])


def _complete(orders: dict[str, Any]) -> dict[str, Any]:
    """Add to the orders of all ranks what Ray knows of this one."""
    context = ray.train.get_context()
    orders["attempt"]["marks"][PROCESSES] = process_start()
    return {
        **orders,
        "rank": context.get_world_rank(),
        "world_size": context.get_world_size(),
        "device": _device_index() if orders["gpu"] else context.get_local_rank(),
        "node": ray.get_runtime_context().get_node_id(),
        "node_address": ray.util.get_node_ip_address(),
        "address": os.environ[ADDRESS_VARIABLE],
        "port": int(os.environ[PORT_VARIABLE]),
    }


def _device_index() -> int:
    """Return the place of this rank's GPU among those that it sees."""
    (own,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    visible = os.environ.get(GPUS_VARIABLE, "").split(",")
    return visible.index(str(own)) if str(own) in visible else int(own)


def _free_address() -> tuple[str, int]:
    address = ray.util.get_node_ip_address()
    with socket.create_server((address, 0), family=_family(address)) as server:
        return address, server.getsockname()[1]


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _meet_at(address: str, port: int) -> None:
    os.environ.update({ADDRESS_VARIABLE: address, PORT_VARIABLE: str(port)})
