"""The seconds of a start by phase: measured where they pass, and shown in one line."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from resnet_dist.config import Recipe
from resnet_dist.launch.attempt import Attempt
from resnet_dist.launch.rank import run_attempt
from resnet_dist.launch.start_times import (
    BEGIN,
    ENDED,
    IMPORTS,
    PLACED,
    PROCESSES,
    describe_start,
    phases_of,
    process_start,
)
from resnet_dist.runs.folder import Restarted, RunFolder, read_run
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.spool import Follower, Spool, has_steps, start_seconds
from resnet_dist.train.watch.progress import GATHERING, NEXT_BATCH, Progress
from resnet_dist.world import World


def test_the_phases_add_up_whatever_the_clocks_say() -> None:
    marks = {BEGIN: 100.0, ENDED: 101.2, PLACED: 101.6, PROCESSES: 90.0, IMPORTS: 116.6}
    phases = phases_of(marks)
    assert phases == {ENDED: 1.2, PLACED: 0.4, PROCESSES: 0.0, IMPORTS: 15.0}
    line = "attempt 2: first step after 16.6 s (ranks ended 1.2, placed 0.4, processes 0.0, imports 15.0)"
    assert describe_start(2, phases) == line


def test_the_start_of_this_process_is_known() -> None:
    assert 0.0 < time.time() - process_start() < 24 * 3600


def test_progress_notes_the_first_batch_and_the_first_step() -> None:
    progress, calls = Progress(), []
    progress.on_first_step = lambda: calls.append(progress.step)
    for phase, step, noted in [
        (GATHERING, 40, 0),  # the evaluation that the attempt before did not finish
        (NEXT_BATCH, 40, 1),
        ("in the forward pass", None, 2),
        ("in the backward pass", None, 2),
        (GATHERING, 41, 3),
        (NEXT_BATCH, 41, 3),
        (NEXT_BATCH, 42, 3),
    ]:
        progress.at(phase, step)
        assert len(progress.start_times) == noted, phase
    assert calls == [41]


def test_a_restart_records_its_seconds(tmp_path: Path, digits_recipe: Recipe) -> None:
    recipe = digits_recipe.with_overrides(["train.length=2 steps", "train.log_every=2 steps"])
    run = RunFolder(open_storage(tmp_path), "x", None, 1, {}, marks={BEGIN: time.time()})
    run.write()
    assert run_attempt(Attempt.of(recipe, run, cpus=1), World.single()) is not None
    (first,) = [entry for entry in Follower(run.spool).read() if entry.start]
    assert first.start is not None
    assert (first.start["attempt"], first.metrics, first.note) == (1, {}, None)
    recipe = recipe.with_overrides(["train.length=4 steps"])
    restarts = (Restarted(2, "rank 1 was killed", 2),)
    run = replace(run, attempt=2, restarts=restarts, marks={BEGIN: time.time(), ENDED: time.time()})
    run.write()
    assert run_attempt(Attempt.of(recipe, run, cpus=1), World.single()) is not None
    entries = Follower(run.spool).read()
    entry = [entry for entry in entries if entry.start][-1]
    assert entry.start is not None
    assert list(entry.start["phases"]) == [
        "ranks ended",
        "processes",
        "imports",
        "connected",
        "checkpoint",
        "data",
        "step",
    ]
    assert entry.note is not None
    assert entry.note.startswith("attempt 2: first step after ")
    assert entry.metrics == {"perf/restarts": 1.0, "perf/restart_seconds": entry.start["seconds"]}
    assert entry.step == 3
    again = read_run(run.storage)
    assert again is not None
    assert again.restarts == restarts
    seconds = start_seconds(entries)
    assert str(again.with_seconds({2: 31.2}).restarts[0]) == "rank 1 was killed; resumed from step 2, 31 s"
    assert seconds.keys() == {1, 2}


def test_a_first_step_alone_is_no_metric_of_training(tmp_path: Path) -> None:
    spool = open_storage(tmp_path).log("spool.jsonl")
    with Spool(spool) as written:
        written.log_start({"attempt": 2, "seconds": 1.0}, 3, {"perf/restarts": 1.0}, "attempt 2")
    assert not has_steps(spool)
