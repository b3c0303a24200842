"""The run and the step that a forked run began with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lineage:
    """The checkpoint of another run that this one began with, as run.json and MLflow record it."""

    run: str  # its name
    step: int
    location: str  # of its folder
    run_id: str | None  # in MLflow

    def __str__(self) -> str:
        return f"step {self.step} of run {self.run}"
