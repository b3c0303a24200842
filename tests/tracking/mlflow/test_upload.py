"""The upload: all of the spool, once, whatever the server does; and never longer than its timeout."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.entities import Metric

from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Log
from resnet_dist.tracking import console
from resnet_dist.tracking.mlflow import upload
from resnet_dist.tracking.mlflow.upload import MAX_METRICS_PER_REQUEST, Uploader
from resnet_dist.tracking.spool import Entry, Spool

SOON = 60.0  # seconds; a timeout that is never reached


class Store:
    """An MLflow run in memory; `fail` is called before each call and may raise."""

    def __init__(self, fail: Callable[[], None] = lambda: None) -> None:
        self.rows: list[tuple[str, int, float]] = []
        self.requests: list[int] = []
        self._fail = fail

    def newest_steps(self) -> dict[str, int]:
        self._fail()
        return {name: max(step for other, step, _ in self.rows if other == name) for name, _, _ in self.rows}

    def log_metrics(self, metrics: list[Metric]) -> None:
        self._fail()
        self.requests.append(len(metrics))
        self.rows += [(metric.key, metric.step, metric.value) for metric in metrics]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(upload, "MAX_BACKOFF_SECONDS", 0.001)


def ignore(entry: Entry) -> None:
    pass


def spool_in(folder: Path) -> Log:
    return open_storage(folder).log("spool")


def write(lines: Log, steps: range) -> list[tuple[str, int, float]]:
    with Spool(lines) as spool:
        for step in steps:
            spool.log({"train/loss": 1 / (1 + step), "train/top1": 0.5}, step)
    return [
        row for step in steps for row in (("train/loss", step, 1 / (1 + step)), ("train/top1", step, 0.5))
    ]


def test_all_arrive_in_requests_that_mlflow_takes(tmp_path: Path) -> None:
    rows, store = write(spool_in(tmp_path), range(700)), Store()
    uploader = Uploader(spool_in(tmp_path), store, ignore)
    uploader.start()
    assert uploader.finish(SOON) == 0
    assert store.rows == rows
    assert max(store.requests) <= MAX_METRICS_PER_REQUEST


def test_an_outage_costs_nothing(tmp_path: Path) -> None:
    """Let every second call fail: a part of the metrics has arrived when the rest is sent again."""
    calls = iter(range(1000))

    def fail() -> None:
        if next(calls) % 2 == 0:
            raise ConnectionError("the server is away")

    store = Store(fail)
    rows = write(spool_in(tmp_path), range(1200))
    uploader = Uploader(spool_in(tmp_path), store, ignore)
    uploader.start()
    assert uploader.finish(SOON) == 0
    assert store.rows == rows


def test_what_the_store_has_is_not_sent_again(tmp_path: Path) -> None:
    """The driver died, and its restart repeated some steps."""
    store = Store()
    store.rows = write(spool_in(tmp_path), range(10))[:11]  # The loss of step 5 arrived, its top-1 did not.
    write(spool_in(tmp_path), range(7, 12))
    uploader = Uploader(spool_in(tmp_path), store, ignore)
    uploader.start()
    assert uploader.finish(SOON) == 0
    assert sorted(store.rows) == sorted(write(spool_in(tmp_path / "other"), range(12)))


def test_a_torn_line_and_what_is_not_finite_are_left_out(tmp_path: Path) -> None:
    write(spool_in(tmp_path), range(2))
    with (tmp_path / "spool").open("a") as file:
        file.write('{"time_ms": 1, "step": 2, "metr')
    with Spool(spool_in(tmp_path)) as spool:
        spool.log({"train/loss": math.inf, "train/top1": 0.25}, 3)
    store = Store()
    uploader = Uploader(spool_in(tmp_path), store, ignore)
    uploader.start()
    assert uploader.finish(SOON) == 0
    assert store.rows[4:] == [("train/top1", 3, 0.25)]


@pytest.fixture
def stuck() -> Iterator[Callable[[], None]]:
    """Yield a function that does not return before the test ends."""
    end = threading.Event()
    yield lambda: end.wait() and None
    end.set()


def test_a_server_that_never_answers_is_not_waited_for(tmp_path: Path, stuck: Callable[[], None]) -> None:
    rows = write(spool_in(tmp_path), range(3))
    uploader = Uploader(spool_in(tmp_path), Store(stuck), ignore)
    uploader.start()
    assert uploader.finish(0.01) == len(rows)


def test_a_server_that_is_away_leaves_the_number_of_metrics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ConnectionError("no route")

    rows = write(spool_in(tmp_path), range(3))
    uploader = Uploader(spool_in(tmp_path), Store(fail), ignore)
    uploader.start()
    assert uploader.finish(0.05) == len(rows)
    assert "6 metrics could not be sent: ConnectionError: no route" in caplog.text


def test_one_that_was_never_started_can_be_finished(tmp_path: Path) -> None:
    assert Uploader(spool_in(tmp_path), Store(), ignore).finish(SOON) == 0


def test_a_display_that_fails_does_not_end_the_upload(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = threading.Event()

    def show(entry: Entry) -> None:
        shown.set()
        raise BrokenPipeError("the terminal has gone")

    store = Store()
    uploader = Uploader(spool_in(tmp_path), store, show)
    uploader.start()
    rows = write(spool_in(tmp_path), range(2))
    assert shown.wait(SOON)
    rows += write(spool_in(tmp_path), range(2, 4))
    assert uploader.finish(SOON) == 0
    assert store.rows == rows
    assert caplog.text.count("not shown from here on") == 1


def test_a_full_disk_costs_metrics_not_the_training(caplog: pytest.LogCaptureFixture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Spool(open_storage(Path("/dev")).log("full")) as spool:
        spool.log({"train/loss": 1.0}, 1)
    assert caplog.text.count("not recorded from here on") == 1
