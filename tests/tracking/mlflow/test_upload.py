"""The upload: all of the spool, once, whatever the server does; and never longer than its timeout."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
from mlflow.entities import Metric

from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Log
from resnet_dist.tracking import console
from resnet_dist.tracking.backlog import MAX_METRICS_PER_REQUEST, Backlog
from resnet_dist.tracking.console import SpoolThread
from resnet_dist.tracking.mlflow import upload
from resnet_dist.tracking.mlflow.run import RunGone
from resnet_dist.tracking.mlflow.upload import Uploader
from resnet_dist.tracking.origin import MACHINE_PREFIX
from resnet_dist.tracking.spool import Entry, Spool

SOON = 60.0  # seconds; a timeout that is never reached


class Store:
    """An MLflow run in memory; `fail` is called before each call and may raise."""

    def __init__(self, fail: Callable[[], None] = lambda: None) -> None:
        self.rows: list[tuple[str, int, float]] = []
        self.requests: list[int] = []
        self.tags: dict[str, str] = {}
        self._fail = fail

    def newest_steps(self) -> dict[str, int]:
        self._fail()
        return {name: max(step for other, step, _ in self.rows if other == name) for name, _, _ in self.rows}

    def set_tags(self, tags: dict[str, str]) -> None:
        self._fail()
        self.tags |= tags

    def delete_tags(self, names: Collection[str]) -> None:
        self._fail()
        for name in names:
            self.tags.pop(name, None)

    def log_metrics(self, metrics: list[Metric]) -> None:
        self._fail()
        self.requests.append(len(metrics))
        self.rows += [(metric.key, metric.step, metric.value) for metric in metrics]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(upload, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(upload, "SEND_SECONDS", 0.001)
    monkeypatch.setattr(upload, "MAX_BACKOFF_SECONDS", 0.001)


def upload_to(store: Store, spool: Log, report: Callable[[str], None] = lambda text: None) -> Uploader[Store]:
    return Uploader(spool, lambda: store, lambda error: f"{type(error).__name__}: {error}", report)


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
    uploader = upload_to(store, spool_in(tmp_path))
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
    uploader = upload_to(store, spool_in(tmp_path))
    uploader.start()
    assert uploader.finish(SOON) == 0
    assert uploader.num_waiting() == 0
    assert store.rows == rows


def test_what_the_store_has_is_not_sent_again(tmp_path: Path) -> None:
    """The driver died, and its restart repeated some steps."""
    store = Store()
    store.rows = write(spool_in(tmp_path), range(10))[:11]  # The loss of step 5 arrived, its top-1 did not.
    write(spool_in(tmp_path), range(7, 12))
    uploader = upload_to(store, spool_in(tmp_path))
    uploader.start()
    assert uploader.finish(SOON) == 0
    assert sorted(store.rows) == sorted(write(spool_in(tmp_path / "other"), range(12)))


def test_lines_that_come_soon_after_a_request_wait_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request costs a training in the same process as much as a hundred metrics do."""
    monkeypatch.setattr(upload, "SEND_SECONDS", 3600.0)
    rows, store = write(spool_in(tmp_path), range(1)), Store()
    uploader = upload_to(store, spool_in(tmp_path))
    uploader.start()
    while not store.requests:
        time.sleep(0.001)
    for step in range(1, 6):
        rows += write(spool_in(tmp_path), range(step, step + 1))
    assert uploader.finish(SOON) == 0  # The end waits for nothing.
    assert store.requests == [2, 10]
    assert store.rows == rows


def test_a_torn_line_and_what_is_not_finite_are_left_out(tmp_path: Path) -> None:
    write(spool_in(tmp_path), range(2))
    with (tmp_path / "spool").open("a") as file:
        file.write('{"time_ms": 1, "step": 2, "metr')
    with Spool(spool_in(tmp_path)) as spool:
        spool.log({"train/loss": math.inf, "train/top1": 0.25}, 3)
    store = Store()
    uploader = upload_to(store, spool_in(tmp_path))
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
    uploader = upload_to(Store(stuck), spool_in(tmp_path))
    uploader.start()
    assert uploader.finish(0.01) == len(rows)


def test_a_server_that_is_away_leaves_the_number_of_metrics(tmp_path: Path) -> None:
    def fail() -> None:
        raise ConnectionError("no route")

    lines: list[str] = []
    rows = write(spool_in(tmp_path), range(3))
    uploader = upload_to(Store(fail), spool_in(tmp_path), lines.append)
    uploader.start()
    assert uploader.num_waiting() == len(rows)
    assert uploader.finish(0.2) == len(rows)
    assert lines == [
        "ConnectionError: no route; training does not wait for it, and the metrics are kept and sent later"
    ]


def test_a_store_that_is_back_in_the_last_seconds_gets_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the pauses of an outage that has lasted, the next try would come after the end."""
    monkeypatch.setattr(upload, "MAX_BACKOFF_SECONDS", 3600.0)
    monkeypatch.setattr(upload, "LAST_BACKOFF_SECONDS", 0.001)
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        if len(calls) <= 8:
            raise ConnectionError

    store = Store(fail)
    rows = write(spool_in(tmp_path), range(3))
    uploader = upload_to(store, spool_in(tmp_path))
    uploader.start()
    assert uploader.finish(20.0) == 0
    assert store.rows == rows


def test_an_outage_is_one_line_and_its_end_another(tmp_path: Path) -> None:
    failures = iter(range(1000))
    lines: list[str] = []
    back = threading.Event()

    def fail() -> None:
        if next(failures) < 5:
            raise ConnectionError("no route")

    def report(text: str) -> None:
        lines.append(text)
        if "again" in text:
            back.set()

    write(spool_in(tmp_path), range(3))
    uploader = upload_to(Store(fail), spool_in(tmp_path), report)
    uploader.start()
    assert back.wait(SOON)
    assert uploader.finish(SOON) == 0
    assert [line.partition(";")[0] for line in lines] == [
        "ConnectionError: no route",
        "the tracker answers again: 6 metrics sent",
    ]


def test_one_failure_is_no_outage(tmp_path: Path) -> None:
    failures = iter((True, False, False, False))

    def fail() -> None:
        if next(failures, False):
            raise ConnectionError("no route")

    lines: list[str] = []
    rows, store = write(spool_in(tmp_path), range(3)), Store(fail)
    uploader = upload_to(store, spool_in(tmp_path), lines.append)
    uploader.start()
    assert uploader.finish(SOON) == 0
    assert (store.rows, lines) == (rows, [])


def test_a_store_that_opens_late_gets_all_with_the_first_times(tmp_path: Path) -> None:
    rows, store = write(spool_in(tmp_path), range(3)), Store()
    tries = iter(range(1000))

    def open_store() -> Store:
        if next(tries) < 4:
            raise ConnectionError("not yet")
        return store

    uploader = Uploader(spool_in(tmp_path), open_store, str, lambda text: None)
    uploader.start()
    assert uploader.has_tried.wait(SOON)
    assert isinstance(uploader.first_error, ConnectionError)
    assert uploader.finish(SOON) == 0
    assert store.rows == rows


def test_a_run_that_was_deleted_is_opened_again_and_gets_everything(tmp_path: Path) -> None:
    """A person deletes the run in the page while it trains; the new one begins at the first step."""
    deleted = Store()
    arrived = threading.Event()
    alive = [True]

    def fail() -> None:
        if deleted.rows:
            arrived.set()
        if not alive[0]:
            raise RunGone("deleted")

    deleted._fail = fail
    stores = [deleted, Store()]
    uploader = Uploader(spool_in(tmp_path), iter(stores).__next__, str, lambda text: None)
    rows = write(spool_in(tmp_path), range(3))
    uploader.start()
    while not arrived.wait(0.01):
        write(spool_in(tmp_path), range(3, 4))  # The second request shows that the first has arrived.
    alive[0] = False
    rows += write(spool_in(tmp_path), range(3, 6))
    assert uploader.finish(SOON) == 0
    assert sorted(stores[1].rows) == sorted(rows)
    assert uploader.store is stores[1]


def test_one_that_was_never_started_can_be_finished(tmp_path: Path) -> None:
    assert upload_to(Store(), spool_in(tmp_path)).finish(SOON) == 0


def test_a_display_that_fails_does_not_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shown: list[Entry] = []

    def show(entry: Entry) -> None:
        shown.append(entry)
        raise BrokenPipeError("the terminal has gone")

    display = SpoolThread(spool_in(tmp_path), show)
    display.start()
    write(spool_in(tmp_path), range(2))
    display.finish(SOON)
    assert len(shown) == 1
    assert caplog.text.count("not shown from here on") == 1


def test_a_full_disk_costs_metrics_not_the_training(caplog: pytest.LogCaptureFixture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Spool(open_storage(Path("/dev")).log("full")) as spool:
        spool.log({"train/loss": 1.0}, 1)
    assert caplog.text.count("not recorded from here on") == 1


def test_tags_arrive_once_when_the_store_answers(tmp_path: Path) -> None:
    """The causes of restarts, while a tracker is away and after its run was replaced."""
    rows, is_down = write(spool_in(tmp_path), range(2)), [True]

    def fail() -> None:
        if is_down[0]:
            raise ConnectionError("down")

    store = Store(fail)
    uploader = upload_to(store, spool_in(tmp_path))
    uploader.set_tags({"attempt": "2", "restart.2": "rank 1 was killed; resumed from step 4"})
    uploader.start()
    uploader.has_tried.wait(SOON)
    uploader.set_tags({"restart.2": "rank 1 was killed; resumed from step 4, 31 s"})
    assert uploader.has_tags
    is_down[0] = False
    assert uploader.finish(SOON) == 0
    assert store.tags == {"attempt": "2", "restart.2": "rank 1 was killed; resumed from step 4, 31 s"}
    assert store.rows == rows
    assert not uploader.has_tags


def test_tags_of_an_attempt_go_with_it(tmp_path: Path) -> None:
    """After a restart on a machine without a GPU the run must not show the GPU of the one before."""
    failures, store = iter((False, False, True)), Store()
    uploader = upload_to(store, spool_in(tmp_path))
    uploader.set_tags(
        {"resnet_dist.attempt": "1", f"{MACHINE_PREFIX}gpu": "H100", f"{MACHINE_PREFIX}hosts": "a"}
    )
    uploader.start()
    while uploader.has_tags:
        time.sleep(0.001)
    assert store.tags[f"{MACHINE_PREFIX}gpu"] == "H100"

    def fail() -> None:
        if next(failures, False):
            raise ConnectionError

    store._fail = fail
    uploader.set_tags({"resnet_dist.restart.2": "lost", f"{MACHINE_PREFIX}hosts": "b"})
    assert uploader.finish(SOON) == 0
    assert store.tags == {
        "resnet_dist.attempt": "1",
        "resnet_dist.restart.2": "lost",
        f"{MACHINE_PREFIX}hosts": "b",
    }


def test_nothing_is_sent_while_another_driver_may_send_it(tmp_path: Path) -> None:
    write(spool_in(tmp_path), range(2))
    store = Store()
    uploader = Uploader(spool_in(tmp_path), lambda: store, str, lambda text: None, lambda: False)
    uploader.start()
    assert uploader.finish(0.2) == 4
    assert store.rows == []


def test_a_driver_that_may_not_send_is_not_asked_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question is a request to the storage of the run; a thread that repeats it without a pause takes a core."""
    monkeypatch.setattr(upload, "POLL_SECONDS", 3600.0)
    uploader = Uploader(spool_in(tmp_path), Store, str, lambda text: None, lambda: False)
    assert uploader._pause_seconds() == 0.0
    assert not uploader._upload()
    assert uploader._pause_seconds() > 3000.0


def test_counting_what_waits_reads_a_spool_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a tracker has never answered, the gauges ask again and again."""
    lines, num_bytes = spool_in(tmp_path), list[int]()
    read = type(lines).read

    def counted(log: Log, position: str = "") -> tuple[bytes, str]:
        data, end = read(log, position)  # type: ignore[arg-type]
        num_bytes.append(len(data))
        return data, end

    write(lines, range(3))
    backlog = Backlog(lines)
    monkeypatch.setattr(type(lines), "read", counted)
    assert [backlog.num_waiting() for _ in range(5)] == [6] * 5
    write(lines, range(2, 5))
    assert [backlog.num_waiting(), backlog.count()] == [10, 10]
    assert sum(num_bytes) == (tmp_path / "spool").stat().st_size
