"""torchrun: ranks that somebody else has started. Rank 0 is the driver too; the others wait for its word.

    torchrun --nproc-per-node 2 -m resnet_dist train RECIPE.py

The word goes through the store that torchrun's ranks meet in, before a process group exists: a mistake is said
once and ends all ranks, and preparing data may take as long as it takes.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from resnet_dist.config import Recipe
from resnet_dist.errors import AlreadyReported, RankFailed, UserError
from resnet_dist.launch.attempt import Attempt, RankLauncher
from resnet_dist.launch.rank import collective_timeout_seconds, is_echo, lost_peer, run_attempt, run_in_thread
from resnet_dist.runs.folder import RunFolder
from resnet_dist.system.cpus import cpu_count
from resnet_dist.system.signals import StopRequest, signals_call
from resnet_dist.train.loop import Outcome
from resnet_dist.world import World

POLL_SECONDS = 0.1
FIRST_REPORT_SECONDS = 5.0  # that ranks which lost a peer leave to the one that failed


class TorchrunRanks:
    """The ranks that torchrun started. Rank 0 uses it as a context: however it leaves, the others are told."""

    def __init__(self) -> None:
        store, self.rank, self.world_size = next(rendezvous("env://"))
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.launch = _launch_name()
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.restarted = restarts != "0"
        # The store outlives an attempt with --max-restarts, by release: words of the last one must not be heard.
        self._store = dist.PrefixStore(f"resnet_dist/{restarts}/words", store)  # type: ignore[attr-defined]
        self._group_store = dist.PrefixStore(f"resnet_dist/{restarts}/ranks", store)  # type: ignore[attr-defined]
        self._told = False

    def check(self, *, gpu: bool | None) -> bool:
        """Whether to use GPUs. Raises UserError where this machine has fewer than ranks."""
        have = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpu is None:
            gpu = have > 0
        if gpu and have < self.local_world_size:
            raise UserError(
                f"torchrun started {self.local_world_size} ranks on this machine, which has {have} CUDA device(s) "
                "that torch can use; use as many with --nproc-per-node, or --cpu"
            )
        return gpu

    def tell(self, attempt: Attempt | None, *, gpu: bool = False, code: int = 0) -> None:
        """Rank 0's word: what to train, or with which exit code to leave."""
        if not self._told:
            self._told = True
            self._store.set(
                "word", json.dumps({"attempt": attempt and asdict(attempt), "gpu": gpu, "code": code})
            )

    def follow(self) -> int:
        """What every other rank does: wait for the word, train, return the exit code."""
        pause = threading.Event()
        while not self._store.check(["word"]):
            pause.wait(POLL_SECONDS)
        word: dict[str, Any] = json.loads(self._store.get("word"))
        self._store.add("heard", 1)
        if word["attempt"] is None:
            return int(word["code"])
        outcome = self.run(Attempt(**word["attempt"]), gpu=word["gpu"])
        return 0 if outcome is not None and outcome.finished else 130

    def run(self, attempt: Attempt, *, gpu: bool) -> Outcome | None:
        """Join the process group and train as this rank; None where it was interrupted before it could save.

        Raises what ended this rank; AlreadyReported where it ended because another one had.
        """
        stop = StopRequest()
        with signals_call(stop.ask):
            try:
                world = run_in_thread(lambda: self._join(attempt, gpu=gpu), stop.asked)
                if world is None:
                    return None
                outcome = run_attempt(attempt, world, stop.asked, stop.over)
            except Exception as error:
                raise self._explain(error) from error
        if outcome is not None:
            dist.destroy_process_group()
        return outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._told:
            interrupted = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
            self.tell(None, code=2 if isinstance(error, UserError) else interrupted)
            self._wait_until_received()

    def _join(self, attempt: Attempt, *, gpu: bool) -> World:
        return World.join(
            self._group_store,
            rank=self.rank,
            local_rank=self.local_rank,
            world_size=self.world_size,
            gpu=gpu,
            timeout_seconds=collective_timeout_seconds(attempt.recipe),
        )

    def _wait_until_received(self) -> None:
        """Leave last, so that all ranks leave with the same code: torchrun ends the rest when one has left."""
        deadline = time.monotonic() + FIRST_REPORT_SECONDS
        pause = threading.Event()
        while self._store.add("heard", 0) < self.world_size - 1 and time.monotonic() < deadline:
            pause.wait(POLL_SECONDS)

    def _explain(self, error: Exception) -> Exception:
        """The error to show: one that nobody has shown before, and a loss of peers only if it is all there is."""
        try:
            if is_echo(error):
                self._store.wait(["failed"], timedelta(seconds=FIRST_REPORT_SECONDS))
        except RuntimeError:  # nobody has
            if lost_peer(error):
                words = str(error).splitlines()[0]
                error = RankFailed(
                    f"rank {self.rank} lost another one, which was killed or cut off ({words})"
                )
        try:
            first = self._store.add("failed", 1) == 1
        except RuntimeError:  # the store has gone with its process
            first = True
        return error if first else AlreadyReported(str(error))


def _launch_name() -> str:
    """torchrun's name for its run, which its restarts share."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none":
        return name
    # What torchrun calls every run that it was not told a name for. Its process started all ranks of this node.
    return f"{platform.node()}-{os.getppid()}"


def torchrun_launcher(recipe: Recipe, ranks: TorchrunRanks, *, gpu: bool | None) -> RankLauncher:
    """Return what trains `recipe` with the ranks of torchrun, of which this process is rank 0. Raises UserError."""
    use_gpu = ranks.check(gpu=gpu)

    def launch(folder: RunFolder) -> Outcome | None:
        attempt = Attempt.of(recipe, folder, threads=max(1, cpu_count() // ranks.local_world_size))
        ranks.tell(attempt, gpu=use_gpu)
        return ranks.run(attempt, gpu=use_gpu)

    return launch
