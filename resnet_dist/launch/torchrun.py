"""torchrun: train with the ranks that it has started. Rank 0 is the driver too; the others follow its orders.

    torchrun --nproc-per-node 2 -m resnet_dist train RECIPE.py

The orders go through the store in which torchrun's ranks meet, before there is a process group. So a mistake
is reported once and ends all ranks, and no timeout limits the preparation of data.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from resnet_dist.config import Recipe
from resnet_dist.errors import INTERRUPTED_EXIT_CODE, AlreadyReported, RankFailed, UserError, exit_code_of
from resnet_dist.launch.attempt import Attempt, RankLauncher
from resnet_dist.launch.checkpoint_evaluator import catch_up_here
from resnet_dist.launch.fence import Fence
from resnet_dist.launch.rank import is_echo, lost_peer, run_attempt
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.system.command import TRAINING_THREAD
from resnet_dist.system.cpus import cpu_count
from resnet_dist.system.environment.network import follow_nccl
from resnet_dist.system.limit import Call, within
from resnet_dist.system.signals import StopRequest, handle_signals
from resnet_dist.system.streams import log_to
from resnet_dist.train.loop import Outcome
from resnet_dist.train.watch.progress import collective_timeout_seconds
from resnet_dist.world import World

POLL_SECONDS = 0.1
# Ranks that lost a peer wait this long for the rank that failed to report its error first.
FIRST_REPORT_SECONDS = 5.0
ORDERS_KEY, RECEIVED_KEY, FAILED_KEY = "orders", "received", "failed"  # in the store


class TorchrunRanks:
    """The ranks that torchrun started.

    Rank 0 uses it as a context, whose end announces the exit code to the others.
    """

    def __init__(self) -> None:
        store, self.rank, self.world_size = next(rendezvous("env://"))
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.launch = _launch_name()
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.restarted = restarts != "0"
        # With --max-restarts some releases keep the store: the prefix hides the orders of earlier attempts.
        self._store = dist.PrefixStore(f"resnet_dist/{restarts}/orders", store)  # type: ignore[attr-defined]
        self._group_store = dist.PrefixStore(f"resnet_dist/{restarts}/ranks", store)  # type: ignore[attr-defined]
        self._announced = False

    def use_gpu(self, *, gpu: bool | None) -> bool:
        """Return whether to use GPUs; `gpu` None: where there are any.

        Raises UserError where ranks outnumber them.
        """
        have = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpu is None:
            gpu = have > 0
        if gpu and have < self.local_world_size:
            raise UserError(
                f"torchrun started {self.local_world_size} ranks on this machine, which has {have} CUDA device(s) "
                "that torch can use; use as many with --nproc-per-node, or --cpu"
            )
        return gpu

    def announce(self, attempt: Attempt | None, *, gpu: bool = False, exit_code: int = 0) -> None:
        """Send the other ranks their orders, as rank 0 and once: what to train, or which exit code to use."""
        if not self._announced:
            self._announced = True
            orders = {"attempt": attempt and asdict(attempt), "gpu": gpu, "exit_code": exit_code}
            self._store.set(ORDERS_KEY, json.dumps(orders))

    def follow(self) -> int:
        """Wait for the orders and carry them out, as any rank but 0; return the exit code."""
        pause = threading.Event()
        while not self._store.check([ORDERS_KEY]):
            pause.wait(POLL_SECONDS)
        orders: dict[str, Any] = json.loads(self._store.get(ORDERS_KEY))
        self._store.add(RECEIVED_KEY, 1)
        if orders["attempt"] is None:
            return int(orders["exit_code"])
        attempt = Attempt(**orders["attempt"])
        log_to(open_storage(attempt.folder).local_folder() / f"log-rank-{self.rank}.txt")
        outcome = self.run(attempt, gpu=orders["gpu"])
        return 0 if outcome is not None and outcome.finished else INTERRUPTED_EXIT_CODE

    def run(self, attempt: Attempt, *, gpu: bool) -> Outcome | None:
        """Join the process group and train as this rank; None where it was interrupted before it could save.

        Raises the error that ended this rank; AlreadyReported where another rank failed first.
        """
        stop = StopRequest()
        with handle_signals(stop.request):
            try:
                world = Call(lambda: self._join(attempt, gpu=gpu), TRAINING_THREAD).answer_unless(
                    stop.requested
                )
                if world is None:
                    return None
                # Rank 0 is in the driver's process, which ends by itself.
                with closing(Fence.of(attempt, exits=self.rank > 0)) as fence:
                    outcome = run_attempt(attempt, world, stop.requested, stop.expired, fence=fence)
            except Exception as error:
                explained = self._explain(error)
                if explained is error:
                    raise
                raise explained from error
        if outcome is not None:
            dist.destroy_process_group()
        return outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._announced:
            self.announce(None, exit_code=exit_code_of(error))
            self._wait_until_received()

    def _join(self, attempt: Attempt, *, gpu: bool) -> World:
        if gpu:
            follow_nccl()
        return World.join(
            self._group_store,
            rank=self.rank,
            local_rank=self.local_rank,
            world_size=self.world_size,
            gpu=gpu,
            timeout_seconds=collective_timeout_seconds(attempt.recipe.train.stall_timeout_seconds),
        )

    def _wait_until_received(self) -> None:
        """Wait for the others to receive their exit code: torchrun ends all ranks as soon as one leaves."""
        deadline = time.monotonic() + FIRST_REPORT_SECONDS
        pause = threading.Event()
        while self._store.add(RECEIVED_KEY, 0) < self.world_size - 1 and time.monotonic() < deadline:
            pause.wait(POLL_SECONDS)

    def _explain(self, error: Exception) -> Exception:
        """Return the error that this rank reports: its own where it is the first, AlreadyReported elsewhere.

        The loss of a peer is reported only where no rank reports the cause.
        """
        try:
            if is_echo(error):
                self._store.wait([FAILED_KEY], timedelta(seconds=FIRST_REPORT_SECONDS))
        except RuntimeError:  # No rank has reported the cause, or the store has gone with its process.
            if lost_peer(error):
                cause = str(error).splitlines()[0]
                error = RankFailed(
                    f"rank {self.rank} lost another one, which was killed or cut off ({cause})"
                )
        try:
            first = within(FIRST_REPORT_SECONDS, lambda: self._store.add(FAILED_KEY, 1)) == 1
        except (RuntimeError, TimeoutError):  # The store has gone with its process, or is stopped with it.
            first = True
        return error if first else AlreadyReported(str(error))


def _launch_name() -> str:
    """Return a name for this launch of torchrun, which its restarts share."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none":
        return name
    # torchrun calls every run without --rdzv-id `none`. Our parent is its process, which survives a restart.
    return f"{platform.node()}-{os.getppid()}"


def torchrun_launcher(
    recipe: Recipe,
    ranks: TorchrunRanks,
    *,
    gpu: bool | None,
    report: Callable[[str], None] = lambda text: None,
) -> RankLauncher:
    """Return a launcher for the ranks of torchrun, of which this process is rank 0.

    Raises UserError where this machine has fewer GPUs than ranks.
    """
    use_gpu = ranks.use_gpu(gpu=gpu)

    def launch(folder: RunFolder) -> Outcome | None:
        cpus = max(1, cpu_count() // ranks.local_world_size)
        # The others wait for their orders.
        catch_up_here(recipe, folder, cpus, gpu=use_gpu, report=report)
        attempt = Attempt.of(recipe, folder, cpus=cpus)
        ranks.announce(attempt, gpu=use_gpu)
        return ranks.run(attempt, gpu=use_gpu)

    return launch
