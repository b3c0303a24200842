"""A stall is reported within a minute: by one rank, once, with host, phase and stack, and once more when it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from resnet_dist.runs.stalls import POLL_SECONDS
from resnet_dist.train.watch import watchdog as module
from resnet_dist.train.watch.positions import Position, Reading
from resnet_dist.train.watch.progress import FIRST_TIMEOUT_FACTOR, NEXT_BATCH, Progress
from resnet_dist.train.watch.watchdog import REPORT_SECONDS, StallReport, Watchdog
from resnet_dist.world import World

RANKS = 4
LOOK_SECONDS = 0.2
FORWARD = "in the forward pass"


class FakeBoard:
    """A Board whose reading the test sets."""

    reading = Reading(())

    def __init__(self, world: World, position: Callable[[int], Position], poll_seconds: float) -> None:
        self.reads = False

    def read(self) -> Reading:
        assert self.reads, "The positions of the others are read only in a stall."
        return FakeBoard.reading

    def close(self) -> None:
        pass


class Rank:
    """One rank after its warm-up: its watchdog, with a clock of the test, and what that reports."""

    def __init__(self, rank: int = 0, world_size: int = RANKS, timeout: float = 600.0) -> None:
        self.now, self.progress = 0.0, Progress()
        self.reports: list[StallReport] = []
        self.reported_at: list[float] = []
        world = World(rank, 0, world_size, torch.device("cpu"))
        thread = threading.current_thread()
        self.dog = Watchdog(self.progress, thread, world, timeout, lambda: self.now, self._take)
        for step in range(3):
            self.enter(NEXT_BATCH, step)
            self.enter(FORWARD)

    def _take(self, report: StallReport) -> None:
        self.reports.append(report)
        self.reported_at.append(self.now)

    def enter(self, phase: str, step: int | None = None) -> None:
        self.progress.at(phase, step)
        self.dog.look()

    def stand(self, seconds: float) -> None:
        for _ in range(round(seconds / LOOK_SECONDS)):
            self.now += LOOK_SECONDS
            self.dog.look()

    @property
    def lines(self) -> list[str]:
        return [report.line for report in self.reports]


@pytest.fixture(autouse=True)
def board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Board", FakeBoard)


def at(moves: int, line: str = "loader.py:120 next_batch", beat: int = 9, rank: int = 0) -> Position:
    return Position(moves, 120, NEXT_BATCH, line, beat, f"h{rank}", ("a.py:1 main", "b.py:2 wait"))


def positions(behind: tuple[int, ...] = (), moves: int = 500) -> tuple[Position, ...]:
    return tuple(at(moves - (rank in behind), rank=rank) for rank in range(RANKS))


def test_a_rank_that_stands_still_is_named_within_a_minute() -> None:
    FakeBoard.reading = Reading(positions(behind=(3,)))
    rank = Rank()
    begin = rank.now
    rank.stand(60 - 2 * POLL_SECONDS)  # The driver sees the report a little later.
    assert rank.lines == [
        "rank 3 on h3 has not moved for 45 s: at step 120, waiting for data (loader.py:120 next_batch); the others wait"
    ]
    assert rank.reported_at[0] - begin < 60
    assert rank.reports[0].details == (
        "rank 3 on h3, at step 120, waiting for data:",
        "  a.py:1 main",
        "  b.py:2 wait",
    )
    rank.stand(120)
    rank.enter(FORWARD)
    rank.stand(10)
    assert rank.lines[1:] == ["rank 3 on h3 moves again, after 176 s without progress at step 120"]
    assert rank.reports[0].key < rank.reports[1].key  # The driver shows them in this order.


@pytest.mark.parametrize(
    ("reading", "writer", "text"),
    [
        (Reading(positions(behind=(0,))), 0, "rank 0 on h0 has not moved for 45 s"),
        (Reading(positions(behind=(1, 2))), 0, "ranks 1 on h1, 2 on h2 have not moved for 45 s"),
        (
            Reading(positions(), silent=(3,)),
            0,
            "rank 3 on h3 has not answered for 45 s, last seen at step 120",
        ),
        (Reading(positions(), silent=(0, 1)), 2, "ranks 0 on h0, 1 on h1 have not answered for 45 s"),
        (
            Reading((Position(-1, -1, "", "", 0), *positions()[1:]), silent=(0,)),
            1,
            "rank 0 has not answered for 45 s, while rank 1",
        ),
        (
            Reading(positions()),
            0,
            "none of 4 ranks has moved for 45 s: all are at step 120, waiting for data (lo",
        ),
        (
            Reading((*positions()[1:], at(500, "shard_cache.py:9 fetch", rank=3))),
            0,
            "none of 4 ranks has moved for 45 s: at step 120, waiting for data, are rank 0 on h1 (loader.py:120 "
            "next_batch), ",
        ),
    ],
)
def test_one_rank_that_answers_reports_it(reading: Reading, writer: int, text: str) -> None:
    FakeBoard.reading = reading
    answering = [number for number in range(RANKS) if number not in reading.silent]
    ranks = {number: Rank(number) for number in answering}
    for rank in ranks.values():
        rank.stand(60)
        rank.enter(FORWARD)
    assert {number: len(rank.reports) for number, rank in ranks.items()} == {
        number: 2 * (number == writer) for number in answering
    }
    assert ranks[writer].lines[0].startswith(text)


def test_without_the_store_what_was_read_before_the_stall_is_not_used() -> None:
    FakeBoard.reading = Reading(positions(), silent=(0,), store_answers=False)
    rank = Rank(1)
    rank.stand(60)
    assert "last seen" not in rank.lines[0]
    assert rank.reports[0].details == ()


def test_without_the_store_all_report_under_one_name_and_the_lowest_rank_first() -> None:
    FakeBoard.reading = Reading(positions(), silent=(0,), store_answers=False)
    ranks = [Rank(number) for number in range(1, RANKS)]
    for rank in ranks:
        rank.stand(60)
        rank.enter(FORWARD)
    assert len({tuple(report.key for report in rank.reports) for rank in ranks}) == 1
    assert [len(rank.reports) for rank in ranks] == [2, 2, 2]
    first = [rank.reported_at[0] for rank in ranks]
    assert first == sorted(set(first))
    assert (
        ranks[0]
        .lines[0]
        .startswith("rank 0 on h0 has not answered for 47 s, while rank 1 is at step 2, in the f")
    )
    assert ranks[0].lines[1] == "rank 0 on h0 moves again, after 60 s without progress at step 2"


def test_a_reading_with_too_few_polls_names_nobody() -> None:
    FakeBoard.reading = Reading(positions(), is_complete=False)
    rank = Rank()
    rank.stand(50)
    assert rank.lines == []
    FakeBoard.reading = Reading(positions(), silent=(2,))
    rank.stand(1)
    assert rank.lines[0].startswith("rank 2 on h2 has not answered")


def test_the_next_rank_is_named_where_the_first_moves_and_another_one_stands() -> None:
    FakeBoard.reading = Reading(positions(behind=(3,)))
    rank = Rank()
    rank.stand(60)
    FakeBoard.reading = Reading(positions(behind=(2,)))
    rank.stand(60)
    assert [line.split(" on")[0] for line in rank.lines] == ["rank 3", "rank 3", "rank 2"]
    assert "moves again" in rank.lines[1]


def test_the_first_pass_through_a_phase_may_take_longer() -> None:
    FakeBoard.reading = Reading(positions())
    rank = Rank()
    rank.enter("evaluating")
    rank.stand(FIRST_TIMEOUT_FACTOR * REPORT_SECONDS - 1)
    assert rank.lines == []
    rank.stand(2)
    assert len(rank.lines) == 1


def test_a_phase_that_always_takes_long_is_no_stall_and_one_stall_does_not_hide_the_next() -> None:
    rank = Rank(world_size=1)
    for _ in range(4):
        rank.enter("in the backward pass")
        rank.stand(80)  # as a large net on a CPU
        rank.enter(NEXT_BATCH, 4)
    assert rank.lines == []
    rank.stand(300)
    rank.enter(FORWARD)
    rank.enter(NEXT_BATCH, 5)
    rank.stand(50)
    assert [line.partition(" for ")[0].partition(",")[0] for line in rank.lines] == [
        f"nothing has moved on {rank.dog.position().host}",
        "training moves again",
        f"nothing has moved on {rank.dog.position().host}",
    ]


def test_a_rank_that_was_paused_itself_reports_nothing() -> None:
    rank = Rank(world_size=1)
    rank.now += 3600
    rank.dog.look()
    rank.enter(NEXT_BATCH, 4)
    assert rank.lines == []


def test_a_short_timeout_leaves_time_for_the_report() -> None:
    FakeBoard.reading = Reading(positions(behind=(1,)))
    rank = Rank(timeout=8)
    rank.stand(5)
    assert rank.lines[0].startswith("rank 1 on h1 has not moved for 4 s")
