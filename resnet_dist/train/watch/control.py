"""Stop or save at the same step on all ranks, without making them wait for one another.

A rank cannot stop or save alone: the others would wait for it in the next collective. So each rank posts its requests
after a step, and after the next step reads what any rank requested: all act at the same step. The exchange runs on the
CPU, in a gloo group of its own, while the next step is computed; it never waits for a GPU's queue.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from resnet_dist.train.watch.progress import collective_timeout_seconds
from resnet_dist.world import World


class Stopped(Exception):
    """The signal to abandon what is under way: all ranks have agreed to stop."""


class Control:
    """The common decisions of all ranks: after `agree()`, `stop` and `save` are the same on every rank.

    The loop calls `agree()` once per step, and once per batch of an evaluation.
    """

    def __init__(
        self,
        world: World,
        stall_timeout_seconds: float,
        stop_requested: Callable[[], bool],
        save_requested: Callable[[], bool],
    ) -> None:
        self.stop = False  # once True, stays True
        self.save = False  # once True, stays True until `saved()` is called
        self._stop_requested, self._save_requested = stop_requested, save_requested
        self._group: Any = None
        if world.world_size > 1:
            # Without it, a group of gloo gives up after 30 minutes, whatever the timeout of the default group is.
            timeout = timedelta(seconds=collective_timeout_seconds(stall_timeout_seconds))
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._posted: tuple[torch.Tensor, Any] | None = None

    def agree(self) -> None:
        """Read what was posted at the last call, then post this rank's requests. All ranks call it equally often."""
        if self._group is None:
            self._take(self._requests())
            return
        if self._posted is not None:
            requests, work = self._posted
            work.wait()  # returns at once, unless a rank is more than a step behind
            self._posted = None
            self._take(requests.tolist())
        if not self.stop:
            requests = torch.tensor(self._requests(), dtype=torch.int32)
            work = dist.all_reduce(requests, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._posted = requests, work

    def saved(self) -> None:
        self.save = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Without an error all ranks leave the loop at the same step, so the exchange completes.
        if self._posted is not None and error is None:
            self._posted[1].wait()
        if self._group is not None and error is None:
            dist.destroy_process_group(self._group)

    def _requests(self) -> list[int]:
        # Do not request a save that is agreed on but not yet made: it would be made twice.
        return [self._stop_requested(), not self.save and self._save_requested()]

    def _take(self, requests: list[int]) -> None:
        self.stop = self.stop or bool(requests[0])
        self.save = self.save or bool(requests[1])
