"""The table of faults: one row for each, printed and written to the file that RESNET_DIST_FAULT_TABLE names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from resnet_dist.runs.folder import RunFolder
from tests.cluster.results import Result

TABLE_VARIABLE = "RESNET_DIST_FAULT_TABLE"


@dataclass(frozen=True)
class Row:
    """One fault, and the run that went through it."""

    fault: str
    next_step_seconds: float  # from the fault to the next optimizer step
    # From the fault until none of the ranks that ran then is left; None: not waited for.
    ranks_gone_seconds: float | None
    exit_codes: str
    status: str
    attempts: int
    lost: int
    doubled: int
    difference: float  # relative, of the metrics; 0: bitwise equal

    def cells(self) -> list[str]:
        def cell(value: object) -> str:
            if isinstance(value, float):
                return "0" if value == 0 else f"{value:.1e}" if value < 1e-3 else f"{value:.1f}"
            return "–" if value is None else str(value)

        return [cell(value) for value in astuple(self)]


class FaultTable:
    """The rows so far."""

    def __init__(self, uncaptured: Callable[[], AbstractContextManager[None]]) -> None:
        """uncaptured: in it, what is printed reaches the terminal."""
        self.rows: list[Row] = []
        self._uncaptured = uncaptured

    def add(
        self,
        fault: str,
        run: RunFolder,
        result: Result,
        undisturbed: Result,
        *,
        next_step_seconds: float,
        exit_codes: Sequence[int],
        ranks_gone_seconds: float | None = None,
    ) -> Row:
        """Add the row of a run that has ended, print it, write all rows, and return it."""
        row = Row(
            fault,
            next_step_seconds,
            ranks_gone_seconds,
            ", then ".join(map(str, exit_codes)),
            result.status,
            run.attempt,
            result.num_lost(undisturbed),
            result.num_doubled(undisturbed),
            result.difference(undisturbed),
        )
        self.rows.append(row)
        with self._uncaptured():
            print(f"\n{' | '.join(row.cells())}")
        if path := os.environ.get(TABLE_VARIABLE):
            Path(path).write_text(f"{self}\n")
        return row

    def keep(self, name: str, output: str) -> None:
        """Keep the output of a run beside the table."""
        if path := os.environ.get(TABLE_VARIABLE):
            Path(path).with_name(name).write_text(output)

    def __str__(self) -> str:
        titles = [field.name.replace("_", " ") for field in fields(Row)]
        lines = [titles, ["---"] * len(titles), *(row.cells() for row in self.rows)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
