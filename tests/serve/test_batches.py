"""Requests that wait share a forward pass, one at a time; the failure of one is not that of others."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from resnet_dist.serve import batches
from resnet_dist.serve.app import Settings, _num_threads
from resnet_dist.serve.batches import Batches, Views


def views(*values: int) -> Views:
    return np.array(values, np.uint8)[:, None, None, None]


class Forward:
    """A forward pass that waits for a sign, and returns its input; 99 is a bad one."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.may_go, self.has_begun = threading.Event(), threading.Event()

    def __call__(self, views_NSSC: Views) -> Tensor:
        self.sizes.append(len(views_NSSC))
        self.has_begun.set()
        assert self.may_go.wait(60)
        if 99 in views_NSSC:
            raise ValueError("99")
        return torch.from_numpy(views_NSSC[:, 0, 0].astype(np.float32))


def asked(
    shared: Batches, pool: ThreadPoolExecutor, forward: Forward, *requests: Views
) -> list[Future[Tensor]]:
    """Send a request, and the others while it is computed, in their order."""
    tasks = []
    for number, request in enumerate(requests):
        before = shared._waiting.qsize()
        tasks.append(pool.submit(shared.probabilities, request))
        if number == 0:
            assert forward.has_begun.wait(60)
        else:
            while shared._waiting.qsize() == before:
                pass
    forward.may_go.set()
    return tasks


def test_what_waits_shares_the_next_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_BATCH", 4)
    threads: list[int] = []
    forward = Forward()

    def num_threads(num_images: int) -> int:
        threads.append(num_images)
        return 1

    shared = Batches(forward, num_threads)
    given = [views(1), views(2, 3), views(4), views(5, 6), views(7)]
    with ThreadPoolExecutor(5) as pool:
        answers = [task.result(60).flatten().tolist() for task in asked(shared, pool, forward, *given)]
    assert answers == [[1], [2, 3], [4], [5, 6], [7]]
    assert forward.sizes == threads == [1, 3, 3]
    shared.close()
    assert not shared.thread.is_alive()


def test_a_bad_request_fails_alone() -> None:
    forward = Forward()
    shared = Batches(forward, lambda num_images: 1)
    with ThreadPoolExecutor(4) as pool:
        tasks = asked(shared, pool, forward, views(1), views(2), views(99), views(3))
        with pytest.raises(ValueError, match="99"):
            tasks[2].result(60)
        assert [tasks[number].result(60).item() for number in (0, 1, 3)] == [1, 2, 3]
    assert forward.sizes == [1, 3, 1, 1, 1]
    shared.close()


def test_it_ends_behind_what_waits() -> None:
    forward = Forward()
    shared = Batches(forward, lambda num_images: 1)
    with ThreadPoolExecutor(3) as pool:
        tasks = asked(shared, pool, forward, views(1), views(2))
        closing = pool.submit(shared.close)
        assert [task.result(60).item() for task in tasks] == [1, 2]
        closing.result(60)


def test_small_batches_take_one_thread_and_large_ones_no_more_than_there_are() -> None:
    settings = Settings(Path(), "", work_per_image=20e6, top_k=5, cpus=4, gpu=False)
    assert [_num_threads(settings, count) for count in (1, 2, 5, 10, 256)] == [1, 1, 2, 4, 4]
