"""Wait for an answer no longer than a limit: the client of a server may wait without one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")


def within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """Return what `call` returns and raise what it raises.

    Raises TimeoutError where it has not ended in that time; it then goes on in a thread that ends with the process.
    """
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:  # The caller's thread raises it again below.
            errors.append(error)

    thread = threading.Thread(target=run, name="limited", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answers[0]
