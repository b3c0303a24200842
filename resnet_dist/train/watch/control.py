"""What all ranks decide together at every step, without waiting for one another.

A rank cannot stop or save on its own: the others would wait for it in the next collective. So each posts what
it wishes after a step, and reads after the next one what anyone wished: all act at the same step. The
exchange runs on the CPU, in a gloo group of its own, while the next step is computed; a GPU's queue is never
waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from resnet_dist.world import World


class Stopped(Exception):
    """What is under way is given up: all ranks have agreed to stop."""


class Control:
    """`agree()` once a step, and once a batch of an evaluation; then `stop` and `save` are the same on all ranks."""

    def __init__(
        self, world: World, *, stop_requested: Callable[[], bool], save_requested: Callable[[], bool]
    ) -> None:
        self.stop = False  # stays
        self.save = False  # until `saved`
        self._stop_requested, self._save_requested = stop_requested, save_requested
        self._group: Any = dist.new_group(backend="gloo") if world.world_size > 1 else None
        self._posted: tuple[torch.Tensor, Any] | None = None

    def agree(self) -> None:
        """Take in what was posted a step ago, and post anew. All ranks call it equally often."""
        if self._group is None:
            self._take(self._wishes())
            return
        if self._posted is not None:
            wishes, work = self._posted
            work.wait()  # done long ago, unless a rank is more than a step behind
            self._posted = None
            self._take(wishes.tolist())
        if not self.stop:
            wishes = torch.tensor(self._wishes(), dtype=torch.int32)
            work = dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._posted = wishes, work

    def saved(self) -> None:
        self.save = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._posted is not None and error is None:  # all ranks leave the loop at the same step
            self._posted[1].wait()
        if self._group is not None and error is None:
            dist.destroy_process_group(self._group)

    def _wishes(self) -> list[int]:
        # A wish that has been granted but not yet carried out would otherwise be granted twice.
        return [self._stop_requested(), not self.save and self._save_requested()]

    def _take(self, wishes: list[int]) -> None:
        self.stop = self.stop or bool(wishes[0])
        self.save = self.save or bool(wishes[1])
