"""Calls that may never end, such as those of the client of a server: the caller waits no longer than it wants."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")
POLL_SECONDS = 0.2  # between two checks of a call that a caller may give up


class Call(Generic[Answer]):
    """A call in a thread of its own. One that never returns is left behind, and ends with the process."""

    def __init__(self, function: Callable[[], Answer], name: str = "limited") -> None:
        """Call `function` in a thread of that name."""
        self._function = function
        self._answers: list[Answer] = []
        self._errors: list[BaseException] = []
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def answer_within(self, seconds: float) -> Answer:
        """Return what the function returns and raise what it raises.

        Raises TimeoutError where it has not ended in that time.
        """
        self.thread.join(seconds)
        if self.thread.is_alive():
            raise TimeoutError(f"no answer within {seconds:g} s")
        return self._answer()

    def answer_unless(
        self, give_up: Callable[[], bool], check: Callable[[], None] = lambda: None
    ) -> Answer | None:
        """Return what the function returns and raise what it raises; None where `give_up()` returned true first.

        check: called again and again while the function runs; what it raises ends the wait.
        """
        while self.thread.is_alive():
            self.thread.join(POLL_SECONDS)
            if self.thread.is_alive():
                check()
                if give_up():
                    return None
        return self._answer()

    def _run(self) -> None:
        try:
            self._answers.append(self._function())
        except BaseException as error:  # `_answer` raises it again in the caller's thread.
            self._errors.append(error)

    def _answer(self) -> Answer:
        if self._errors:
            raise self._errors[0]
        return self._answers[0]


def within(seconds: float, function: Callable[[], Answer]) -> Answer:
    """Call `function` for no longer than a limit, see `Call.answer_within`."""
    return Call(function).answer_within(seconds)
