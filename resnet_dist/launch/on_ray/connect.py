"""Connect to a Ray cluster, or start one on this machine that ends with the connection."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from resnet_dist.launch.on_ray.settings import set_defaults

set_defaults()

import ray
import torch

from resnet_dist.config import WorkerRange
from resnet_dist.errors import UserError
from resnet_dist.search_path import hiding_file, neutral_folder
from resnet_dist.system.cpus import cpu_count
from resnet_dist.system.environment.explain import limit_behind
from resnet_dist.system.environment.limits import shared_memory
from resnet_dist.system.files import expanded
from resnet_dist.system.signals import IGNORABLE_SIGNALS, handle_signals, kept_from_children, raise_on_second

# Keep Ray's object store small: batches never pass through it.
QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
TOKEN_FILE = Path("~/.ray/auth_token")  # Ray makes it; whoever reads it may run commands as its owner.
OBJECT_STORE_BYTES = 128 * 2**20


def check_gpus_here(workers: WorkerRange, *, gpu: bool | None) -> None:
    """Raise UserError where this machine, as a cluster of its own, has too few GPUs."""
    devices = torch.cuda.device_count()
    if gpu and devices < workers.preferred:
        raise UserError(
            f"--gpu --workers {workers}: this machine has {devices} CUDA device(s); use fewer workers, --cpu, or "
            "--address of a cluster"
        )


@contextmanager
def connected(
    address: str | None, *, workers: int, report: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start a local one that ends with the context.

    A process that is connected already stays so: the runs of a study, and those inside a trial of a sweep, share one
    Ray. report: receives what a person should know about a local one.

    Raises UserError where Ray cannot connect or start.
    """
    if is_connected():
        yield
        return
    if (hiding := hiding_file()) is not None:
        raise UserError(f"{hiding}: has the name of a library, which no rank could import; rename it")
    try:
        try:
            # Ray passes both on to its processes: a file of the working folder may hide a library, and a terminal
            # that goes away would end them at once, before a checkpoint.
            with neutral_folder(), kept_from_children(*IGNORABLE_SIGNALS):
                _connect(address, workers, report)
        # Ray raises bare Exceptions and OSErrors too; none of them is a defect of ours.
        except Exception as error:
            where = f"at {address}" if address else "here"
            cause = limit_behind(error) or " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"no Ray cluster {where}: {cause}") from None
        yield
    finally:
        # A second signal ends the wait for Ray, but must not replace the outcome of the run.
        with suppress(KeyboardInterrupt), handle_signals(raise_on_second):
            ray.shutdown()


def is_connected() -> bool:
    return bool(ray.is_initialized())


def is_own() -> bool:
    """Report whether Ray was started here, and ends with this process."""
    node = ray._private.worker._global_node
    return node is not None and bool(node.head)  # Ray Client is connected without a node.


@contextmanager
def private_token() -> Iterator[None]:
    """Make the token that Ray uses, for its owner alone from its first moment: Ray would let all users read its own."""
    file = expanded(TOKEN_FILE)
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, exist_ok=True)
    has_other = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if os.environ.get("RAY_AUTH_MODE", "token") == "token" and not has_other:
        _make_token(file)
    try:
        yield
    finally:
        with suppress(OSError):  # It may be another user's, or be missing.
            file.chmod(0o600)


def _make_token(file: Path) -> None:
    """Write a token where there is none, unless the folder cannot be written: then Ray reports that."""
    # A umask would do the same for Ray's own token, but ranks inherit it, and with it all that they write.
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    with suppress(OSError):
        if file.exists():
            return
        with os.fdopen(os.open(aside, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as new:
            new.write(secrets.token_hex(32))
        try:
            os.link(aside, file)  # whole, or not at all; another process may have made one
        finally:
            aside.unlink()


def _connect(address: str | None, workers: int, report: Callable[[str], None]) -> None:
    # Ray prints every death of a worker, whatever its log settings; `explain` names it in one sentence.
    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None
    if address:
        ray.init(address=address, **QUIET)
        return
    plasma, lines = shared_memory()
    for line in lines:
        report(line)
    with private_token():
        _start(workers, plasma)


def _start(workers: int, plasma: Path | None) -> None:
    # As on macOS and Windows, Ray's processes then listen on 127.0.0.1 and not on every interface: no other machine joins.
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init(
        "local",  # Without this, Ray joins any cluster that it finds on this machine.
        # Offer as many CPUs as ranks: a trial of eight ranks on two cores is slow, but allowed.
        num_cpus=max(cpu_count(), workers),
        # Ray counts the entries of CUDA_VISIBLE_DEVICES, also those that torch cannot use.
        num_gpus=torch.cuda.device_count(),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        _plasma_directory=str(plasma) if plasma else None,
        **QUIET,
    )
