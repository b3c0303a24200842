"""TODO map."""

from __future__ import annotations

from typing import Protocol


class Tracker(Protocol):
    """Where rank 0 reports to, from any thread. Never raises into training, never makes it wait."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def log_layers(self, name: str, values: dict[str, float], step: int) -> None: ...

    def note(self, text: str) -> None: ...


class NullTracker:
    """The Tracker of every other rank."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        pass

    def log_layers(self, name: str, values: dict[str, float], step: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass
