"""The publisher that sends a run to MLflow and to other stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import time_ns

from resnet_dist.runs.folder import RunFolder, Status
from resnet_dist.tracking.also.choose import senders_of
from resnet_dist.tracking.also.sending import Sender
from resnet_dist.tracking.protocol import OpenPublisher, Publisher, RunRecord
from resnet_dist.tracking.spool import Entry

SYNC_SECONDS = 600.0  # for a store that gets all of a run


def with_others(open_publisher: OpenPublisher) -> OpenPublisher:
    """Return a function that opens a publisher, and beside it the stores that the run asks for."""

    def opened(record: RunRecord, on_entry: Callable[[Entry], None]) -> Publisher:
        publisher = open_publisher(record, on_entry)

        def report(text: str) -> None:
            on_entry(Entry(time_ns() // 1_000_000, note=text))

        senders = senders_of(record.run, report)
        return FanOutPublisher(publisher, senders) if senders else publisher

    return opened


def send_to_others(run: RunFolder, report: Callable[[str], None]) -> list[str]:
    """Send the stores beside MLflow all that they lack of a run; return what could not be sent, in words."""
    senders = senders_of(run, report)
    for sender in senders:
        sender.start()
    return [unsent for sender in senders if (unsent := sender.finish(SYNC_SECONDS)) is not None]


class FanOutPublisher:
    """A Publisher, and senders to the stores beside it. They get metrics alone, and are closed when these are sent."""

    def __init__(self, publisher: Publisher, senders: Sequence[Sender]) -> None:
        self._publisher, self._senders = publisher, senders
        self._unsent: list[str] = []

    @property
    def run_id(self) -> str | None:
        return self._publisher.run_id

    @property
    def unsent(self) -> tuple[str, ...]:
        return (*self._publisher.unsent, *self._unsent)

    def num_waiting(self) -> int:
        return self._publisher.num_waiting()

    def start(self) -> None:
        self._publisher.start()
        for sender in self._senders:
            sender.start()

    def describe_attempt(self, run: RunFolder) -> None:
        self._publisher.describe_attempt(run)

    def finish(self, timeout_seconds: float) -> None:
        self._publisher.finish(timeout_seconds)
        for sender in self._senders:
            if (unsent := sender.finish(timeout_seconds)) is not None:
                self._unsent.append(unsent)

    def log_results(self, checkpoint: str | None) -> None:
        self._publisher.log_results(checkpoint)

    def close(self, status: Status, timeout_seconds: float) -> None:
        self._publisher.close(status, timeout_seconds)

    def abandon(self) -> None:
        self._publisher.abandon()
        for sender in self._senders:
            sender.stop()
