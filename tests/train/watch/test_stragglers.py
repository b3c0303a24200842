"""The rank that makes the others wait is named, after a minute and every ten minutes, with the cause."""

from __future__ import annotations

import pytest
import torch

from resnet_dist.train.watch.stragglers import MAX_NAMED, Stragglers

FAST = (0.01, 0.2, 0.1)  # waiting for data, computing, waiting for ranks
SLOW_DATA = (0.2, 0.21, 0.0)
SLOW_COMPUTE = (0.01, 0.5, 0.0)


class Watch:
    """A Stragglers with a clock of the test."""

    def __init__(self, ranks: int) -> None:
        self.now, self.lines = 0.0, list[str]()
        hosts = [f"h{rank}" for rank in range(ranks)]
        self._stragglers = Stragglers(hosts, self.lines.append, lambda: self.now)

    def look(self, *rows: tuple[float, float, float], after: float = 20) -> None:
        self.now += after
        self._stragglers.look(torch.tensor(rows, dtype=torch.float64))


def test_a_rank_that_waits_for_data_is_named_after_a_minute_and_every_ten() -> None:
    watch = Watch(4)
    rows = [FAST, FAST, FAST, SLOW_DATA]
    watch.look(*rows)  # It compiles.
    for _ in range(2):
        watch.look(*rows)
    assert watch.lines == []
    watch.look(*rows)
    line = (
        "rank 3 on h3 is slow: 0.41 s a step where the median is 0.21 s, most of the difference waiting for data; the "
        "others wait for it"
    )
    assert watch.lines == [line]
    for _ in range(29):
        watch.look(*rows)
    assert watch.lines == [line]
    watch.look(*rows)
    assert watch.lines == [line, line]


def test_a_rank_that_recovers_begins_anew() -> None:
    watch = Watch(4)
    for rows in [[SLOW_DATA, FAST, FAST, FAST]] * 3 + [[FAST] * 4] + [[SLOW_DATA, FAST, FAST, FAST]] * 2:
        watch.look(*rows)
    assert watch.lines == []


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_a_rank_that_computes_slowly_is_named_on_any_number_of_ranks(ranks: int) -> None:
    watch = Watch(ranks)
    for _ in range(2):
        watch.look(*[FAST] * (ranks - 1), SLOW_COMPUTE, after=60)
    (line,) = watch.lines
    assert line.startswith(f"rank {ranks - 1} on h{ranks - 1} is slow: 0.51 s a step")
    assert "most of the difference computing" in line


def test_ranks_that_only_wait_for_others_are_not_slow() -> None:
    watch = Watch(3)
    for _ in range(3):
        watch.look((0.01, 0.2, 5.0), (0.01, 0.2, 0.0), (0.01, 0.25, 0.0), after=60)
    assert watch.lines == []


def test_one_rank_is_never_slow() -> None:
    watch = Watch(1)
    for _ in range(3):
        watch.look(SLOW_DATA, after=60)
    assert watch.lines == []


def test_many_slow_ranks_are_counted() -> None:
    watch = Watch(40)
    slow = [(0.1 * rank, 0.4, 0.0) for rank in range(1, 11)]
    for _ in range(2):
        watch.look(*[FAST] * 30, *slow, after=60)
    assert [line.split(" on")[0] for line in watch.lines[:MAX_NAMED]] == ["rank 39", "rank 38", "rank 37"]
    assert watch.lines[MAX_NAMED:] == ["and 7 more ranks are slow"]
