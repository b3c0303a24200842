"""Report on the trials of a sweep: a table, the best trial, and a sentence about all of them."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.group_folder import FIGURE_FILE, SWEEP_FILE, TABLE_FILE
from resnet_dist.sweep.figure import draw_sweep
from resnet_dist.sweep.plan import Plan, PlannedTrial
from resnet_dist.sweep.search import Search


@dataclass(frozen=True)
class SweepSummary:
    """The results of a sweep so far, and the files that show them."""

    plan: Plan
    conclusion: str
    figure: Path
    table: Path
    values: Path  # sweep.json
    runs: tuple[RunFolder, ...] = field(default=(), compare=False)
    # What MLflow did not get besides the runs, in words.
    unsent: tuple[str, ...] = field(default=(), compare=False)

    @property
    def left(self) -> list[PlannedTrial]:
        """The trials without a result: they failed, were interrupted, or have not begun."""
        return [trial for trial in self.plan.trials if not trial.has_result]

    @property
    def not_evaluated(self) -> list[PlannedTrial]:
        """The finished trials of which an evaluation has failed."""
        return [trial for trial in self.plan.trials if trial.not_evaluated]


def report(plan: Plan, searches: Sequence[Search], folder: Path) -> SweepSummary:
    """Write the figure and the table of the trials that have ended."""
    conclusion = conclude(plan)
    figure, table = folder / FIGURE_FILE, folder / TABLE_FILE
    draw_sweep(plan, searches, title=f"{folder.name}: {conclusion}").savefig(figure)
    write_table(table, plan)
    return SweepSummary(plan, conclusion, figure, table, folder / SWEEP_FILE)


def conclude(plan: Plan) -> str:
    """Return the best trial with its values, and the numbers of trials by their ends, as one sentence."""
    counts = Counter(trial.outcome.state for trial in plan.trials if trial.outcome is not None)
    ends = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    left = len(plan.trials) - counts.total()
    numbers = f"{len(plan.trials)} trials: {ends or 'none ended'}" + (f", {left} left" if left else "")
    best = plan.best()
    if best is None or best.outcome is None:
        return f"{numbers}; none has a result"
    values = ", ".join(f"{field}={value}" for field, value in best.values.items())
    return f"best {plan.metric} {shown_value(plan, best)} with {values} ({numbers})"


def shown_value(plan: Plan, trial: PlannedTrial) -> str:
    """Return the result of a trial as text."""
    value = trial.outcome.value if trial.outcome is not None else None
    if value is None:
        return "-"
    return f"{value:.4f}" if plan.metric.endswith("loss") else f"{value:.2%}"


def ranked(plan: Plan) -> list[PlannedTrial]:
    """Return the trials, the best first; those without a result last."""
    sign = -1 if plan.mode == "max" else 1

    def rank(trial: PlannedTrial) -> tuple[bool, bool, float]:
        outcome = trial.outcome
        value = outcome.value if outcome is not None else None
        is_whole = outcome is not None and outcome.state == "finished"
        return value is None, not is_whole, sign * (value or 0.0)

    return sorted(plan.trials, key=rank)


def table_lines(plan: Plan) -> list[str]:
    """Return a line for each trial, the best first."""
    fields = list(plan.trials[0].values)
    rows = [["RUN", "STATE", plan.metric.upper(), "STEP", *(name.upper() for name in fields)]]
    for trial in ranked(plan):
        outcome = trial.outcome
        state = trial.state
        step = str(outcome.step) if outcome is not None and outcome.step is not None else "-"
        rows.append([trial.name, state, shown_value(plan, trial), step, *trial.values.values()])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def write_table(path: Path, plan: Plan) -> None:
    """Write a CSV file with a line for each trial: its run, its end, its values and its result."""
    rows = []
    for trial in plan.trials:
        outcome = trial.outcome
        rows.append(
            {
                "run": trial.name,
                "state": trial.state,
                **trial.values,
                plan.metric: "" if outcome is None or outcome.value is None else f"{outcome.value:.6g}",
                "step": "" if outcome is None or outcome.step is None else outcome.step,
                "reason": "" if outcome is None else outcome.reason,
            }
        )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
