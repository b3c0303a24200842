"""A limit on the wait for an answer, and a wait that the caller may give up."""

from __future__ import annotations

import threading

import pytest

from resnet_dist.system.limit import Call, within


def test_an_answer_and_an_error_are_passed_on() -> None:
    assert within(60, lambda: 7) == 7
    assert Call(lambda: 7).answer_unless(lambda: False) == 7
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Call(lambda: 1 / 0).answer_unless(lambda: False)


def test_no_answer_is_a_timeout() -> None:
    end = threading.Event()
    with pytest.raises(TimeoutError, match="no answer within 0.01 s"):
        within(0.01, end.wait)
    end.set()


def test_a_call_is_given_up_and_checked_while_it_runs() -> None:
    end, checks = threading.Event(), []
    assert Call(end.wait).answer_unless(lambda: len(checks) == 2, lambda: checks.append(1)) is None
    assert len(checks) == 2

    def stalled() -> None:
        raise TimeoutError("it hangs")

    with pytest.raises(TimeoutError, match="it hangs"):
        Call(end.wait).answer_unless(lambda: False, stalled)
    end.set()
