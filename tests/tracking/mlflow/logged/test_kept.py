"""The checkpoints of a run are what its journal and its folder have, in whatever order that comes."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from resnet_dist.runs.folder import RunFolder, checkpoint_name
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow.logged import kept
from resnet_dist.tracking.mlflow.logged.kept import Checkpoints
from resnet_dist.tracking.spool import REMOVED, Entry, Follower, Spool
from resnet_dist.train.checkpoint.folder import write_checkpoint


def metrics(step: int, time_ms: int, **values: float) -> Entry:
    return Entry(time_ms, step, {name.replace("_", "/"): value for name, value in values.items()})


def test_a_checkpoint_has_the_metrics_of_its_step_whenever_they_come() -> None:
    """An evaluation beside the training ends after its checkpoint was written."""
    found = Checkpoints()
    entries = [metrics(4, 1, train_loss=2.0, perf_speed=9.0), Entry(2, 4, checkpoint="a" * 64)]
    assert found.add(entries) == {4}
    assert found.add([metrics(4, 3, eval_top1=0.5, eval_loss=math.nan), metrics(5, 4, train_loss=1.0)]) == {4}
    one = found.by_step[4]
    assert (one.sha256, one.removed) == ("a" * 64, False)
    assert one.metrics == {"train/loss": (2.0, 1), "eval/top1": (0.5, 3)}


def test_a_step_that_a_restart_repeats_keeps_its_first_metrics() -> None:
    found = Checkpoints()
    found.add([metrics(4, 1, eval_top1=0.5), Entry(2, 4, checkpoint="a"), Entry(3, 4, checkpoint=REMOVED)])
    assert found.by_step[4].removed
    assert found.add([metrics(4, 9, eval_top1=0.25), Entry(10, 4, checkpoint="b")]) == {4}
    assert (found.by_step[4].sha256, found.by_step[4].removed) == ("b", False)
    assert found.by_step[4].metrics == {"eval/top1": (0.5, 1)}


def test_the_memory_for_steps_without_a_checkpoint_has_a_limit(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(kept, "MAX_STEPS_WAITING", 2)
    found = Checkpoints()
    found.add([metrics(step, step, eval_top1=step / 8) for step in range(1, 6)])
    found.add([Entry(9, step, checkpoint="a") for step in (1, 5)])
    assert found.by_step[1].metrics == {}
    assert found.by_step[5].metrics == {"eval/top1": (5 / 8, 5)}


def test_what_a_killed_writer_did_not_record_is_seen_in_the_folder(tmp_path: Path) -> None:
    run = RunFolder(open_storage(tmp_path), "x", None, 1, {})
    manifest = {"scalars": {}, "recipe": {}, "classes": []}
    written = {
        step: write_checkpoint(
            run.checkpoints, step, {"model": {"x": torch.full((1,), float(step))}}, manifest
        )
        for step in (4, 6, 8)
    }
    (tmp_path / "checkpoints" / checkpoint_name(6) / "checkpoint.json").write_text("{")  # damaged
    with Spool(run.spool) as spool:
        spool.log_checkpoint(2, "gone")
        spool.log_checkpoint(4, written[4]["model.safetensors"])
        # A restart has written it again.
        spool.log_checkpoint(8, "before")
        spool.log_checkpoint(8, None)
    found = Checkpoints()
    found.add(Follower(run.spool).read())
    assert found.compare(run) == {2, 8}
    assert [(one.step, one.removed) for one in found.by_step.values()] == [(2, True), (4, False), (8, False)]
    assert found.by_step[8].sha256 == written[8]["model.safetensors"]
    assert found.compare(run) == set()
