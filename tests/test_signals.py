"""Commands end soon after a signal, whatever the network does: some cells of the table of benchmarks/signals.py."""

from __future__ import annotations

import signal

import pytest

from tests.benchmarks.signals import MAX_SECONDS, MAX_SECONDS_AFTER_SECOND, measure


@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "server", "number"),
    [
        ("index", "busy", signal.SIGINT),
        ("index", "s3-dead", signal.SIGTERM),
        ("verify", "stalled", signal.SIGINT),
        ("prepare", "dead", signal.SIGTERM),
        ("bench", "trickle", signal.SIGINT),
        ("evaluate", "stalled", signal.SIGTERM),
        ("train", "stalled", signal.SIGINT),
    ],
)
def test_a_command_ends_soon_after_a_signal(command: str, server: str, number: signal.Signals) -> None:
    seconds = measure(command, server, number, twice=False)
    assert seconds is not None
    assert seconds < MAX_SECONDS


@pytest.mark.long
def test_a_second_signal_ends_a_command_at_once() -> None:
    seconds = measure("train", "stalled", signal.SIGINT, twice=True)
    assert seconds is not None
    assert seconds < MAX_SECONDS_AFTER_SECOND


def test_an_index_that_waits_is_interrupted() -> None:
    """The cheapest cell, which runs always: it did not end for minutes."""
    assert (measure("index", "stalled", signal.SIGINT, twice=False) or 99) < MAX_SECONDS
