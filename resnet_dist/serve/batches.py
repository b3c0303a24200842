"""One thread that computes: requests that arrive meanwhile share the next forward pass.

So many clients cost no more threads than one does, and no request waits for others to come.

Shapes: N images of a request, S image size, C channels.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnet_dist.predict.classify import MAX_BATCH

Views = NDArray[np.uint8]  # (N, S, S, C), what evaluation sees of images


@dataclass(frozen=True)
class _Request:
    views_NSSC: Views
    answer: Future[Tensor] = field(default_factory=Future)


class Batches:
    """Calls `forward` in a thread of its own, with the images of all requests that wait.

    threads: returns the CPU threads to compute with, from the number of images.
    """

    def __init__(self, forward: Callable[[Views], Tensor], threads: Callable[[int], int]) -> None:
        self._forward, self._threads = forward, threads
        self._waiting: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._left: _Request | None = None  # It did not fit into the batch before.
        self.thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self.thread.start()

    def probabilities(self, views_NSSC: Views) -> Tensor:
        """Return what `forward` returns for these images, and raise what it raises."""
        request = _Request(views_NSSC)
        self._waiting.put(request)
        return request.answer.result()

    def close(self) -> None:
        """End the thread behind what waits."""
        self._waiting.put(None)
        self.thread.join()

    def _run(self) -> None:
        torch.get_num_threads()  # Only a thread that has read this number has one of its own.
        while (batch := self._next_batch()) is not None:
            try:
                self._answer(batch)
            except Exception:
                # Perhaps the images of one request are to blame, or memory does not suffice for all.
                for request in batch:
                    self._answer_alone(request)

    def _next_batch(self) -> list[_Request] | None:
        """Wait for a request; return it with those that wait behind it, or None at the end."""
        first = self._left if self._left is not None else self._waiting.get()
        self._left = None
        if first is None:
            return None
        batch, count = [first], len(first.views_NSSC)
        while count < MAX_BATCH:
            try:
                request = self._waiting.get_nowait()
            except queue.Empty:
                break
            if request is None:  # the end, behind this batch
                self._waiting.put(None)
                break
            if count + len(request.views_NSSC) > MAX_BATCH:
                self._left = request
                break
            batch.append(request)
            count += len(request.views_NSSC)
        return batch

    def _answer(self, batch: Sequence[_Request]) -> None:
        views = np.concatenate([request.views_NSSC for request in batch])
        torch.set_num_threads(self._threads(len(views)))
        answers = self._forward(views)
        first = 0
        for request in batch:
            request.answer.set_result(answers[first : first + len(request.views_NSSC)])
            first += len(request.views_NSSC)

    def _answer_alone(self, request: _Request) -> None:
        if request.answer.done():
            return
        try:
            request.answer.set_result(self._forward(request.views_NSSC))
        except Exception as error:
            request.answer.set_exception(error)
