"""A Reporter for tests: it records what a person would read."""

from __future__ import annotations

from resnet_dist.tracking.spool import Entry


class RecordingReporter:
    """A Reporter that records its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, total_steps: int) -> None:
        pass

    def entry(self, entry: Entry) -> None:
        if entry.note:
            self.note(entry.note)
