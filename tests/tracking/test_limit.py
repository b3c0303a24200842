"""A limit on the wait for an answer."""

from __future__ import annotations

import threading

import pytest

from resnet_dist.tracking.limit import within


def test_an_answer_and_an_error_are_passed_on() -> None:
    assert within(60, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 / 0)


def test_no_answer_is_a_timeout() -> None:
    end = threading.Event()
    with pytest.raises(TimeoutError, match="no answer within 0.01 s"):
        within(0.01, end.wait)
    end.set()
