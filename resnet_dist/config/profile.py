"""The steps that a profile covers, as `--profile START:STOP` names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from resnet_dist.errors import UserError

MAX_STEPS = 100  # A trace of more is too large to be opened.


@dataclass(frozen=True)
class ProfiledSteps:
    """Steps from `start` to `stop`, both included; the first step of a run is 1."""

    start: int
    stop: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the steps of "10:20". Raises UserError."""
        first, colon, last = text.strip().partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise UserError(f"--profile {text!r}: use two steps, the first from 1, such as 10:20")
        if int(last) - int(first) >= MAX_STEPS:
            raise UserError(
                f"--profile {text!r}: a trace has at most {MAX_STEPS} steps, such as {first}:{int(first) + 9}"
            )
        return cls(int(first), int(last))

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def check(self, total_steps: int, taken: int, run: str) -> None:
        """Raise UserError where a run of `total_steps`, of which some are taken, has no such steps any more."""
        if self.stop > total_steps:
            raise UserError(f"--profile {self}: the run has {total_steps} steps; name steps up to that")
        if self.stop <= taken:
            raise UserError(f"--profile {self}: run {run} continues after step {taken}; name steps after it")
