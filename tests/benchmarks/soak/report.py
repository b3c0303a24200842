"""The tables of a soak."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator

from resnet_dist.tracking.spool import Entry
from tests.benchmarks.soak.faults import FAULTS
from tests.benchmarks.soak.scene import RUN, UNDISTURBED, Soak
from tests.cluster.results import Result, journal

LOSS = "train/loss"


def fault_lines(soak: Soak) -> Iterator[str]:
    entries = [entry for entry in journal(soak.scene.run(RUN)) if entry.step is not None and entry.metrics]
    yield "| fault | times | seconds to a new step: median | most |"
    yield "|---|---|---|---|"
    for name in FAULTS:
        seconds = next_step_seconds(soak, entries, name)
        cells = [f"{statistics.median(seconds):.0f}", f"{max(seconds):.0f}"] if seconds else ["–", "–"]
        yield f"| {name} | {sum(each == name for each, _ in soak.struck)} | {' | '.join(cells)} |"


def next_step_seconds(soak: Soak, entries: list[Entry], name: str) -> list[float]:
    """Return the seconds from each fault of this kind to the first step after it that had not been logged before."""
    found = []
    for _, struck in [each for each in soak.struck if each[0] == name]:
        before = max((entry.step or 0 for entry in entries if entry.time_ms / 1000 <= struck), default=0)
        after = [entry.time_ms / 1000 for entry in entries if (entry.step or 0) > before]
        found += [min(after) - struck] if after else []
    return found


def num_logged_again(soak: Soak) -> tuple[int, int]:
    """Return how many log lines repeat a step that an earlier attempt had logged, and how many there are."""
    steps = [entry.step for entry in journal(soak.scene.run(RUN)) if LOSS in entry.metrics]
    return len(steps) - len(set(steps)), len(steps)


def end_lines(soak: Soak) -> Iterator[str]:
    """Yield how the run ended, against the undisturbed one."""
    run = soak.scene.run(RUN)
    undisturbed = Result.of(soak.scene.mlflow, soak.scene.run(UNDISTURBED))
    result = Result.of(soak.scene.mlflow, run)
    codes = ", ".join(f"{code} ({times})" for code, times in sorted(Counter(soak.codes).items()))
    yield f"status: {result.status}"
    yield f"submissions: {len(soak.codes)}; exit codes: {codes}; attempts: {run.attempt}"
    yield "log lines of steps that were trained again: {} of {}".format(*num_logged_again(soak))
    num_points = sum(map(len, undisturbed.points.values()))
    lost, doubled = result.num_lost(undisturbed), result.num_doubled(undisturbed)
    yield f"points in MLflow: {num_points}; lost: {lost}, doubled: {doubled}"
    yield f"largest difference: {result.difference(undisturbed):g}"
    yield f"weights: {result.weights}; undisturbed: {undisturbed.weights}"
    yield f"equal: {result.weights == undisturbed.weights}"
    yield from causes(soak)


def causes(soak: Soak) -> Iterator[str]:
    """Yield the causes of restarts inside submissions, with their numbers."""
    yield from (
        f"restarted {times} times: {cause}"
        for cause, times in Counter(one.cause for one in soak.scene.run(RUN).restarts).most_common()
    )
