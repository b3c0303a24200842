"""The gauges for Prometheus: their values, the file, and what a failing sink does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from resnet_dist.driver.gauges import GAUGES, METRICS_VARIABLE, RunGauges, file_sinks, metrics_file
from resnet_dist.errors import UserError
from resnet_dist.runs.folder import Restarted, RunFolder
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.spool import Entry
from resnet_dist.train.checkpoint.folder import MANIFEST


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    checkpoint = tmp_path / "x/checkpoints/step-00000008"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text(json.dumps({}))
    return RunFolder(open_storage(tmp_path / "x"), "x", None, 1, {})


def values(text: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("ray_").removesuffix('{run="x"}'): float(value) for name, _, value in lines}


def test_the_file_has_the_state_of_the_run(run: RunFolder, tmp_path: Path) -> None:
    path, before, reports = tmp_path / "gauges" / "x.prom", time.time(), list[str]()
    path.parent.mkdir()
    with file_sinks(path, reports.append) as (sink,):
        gauges = RunGauges(run, 132, [sink])
        gauges.send()
        first = values(path.read_text())
        assert first["resnet_dist_step_time_seconds"] >= before  # A start that hangs raises an alert too.
        assert "resnet_dist_step" not in first
        # A run that is resumed the next morning must not raise the alert of an old checkpoint.
        checkpoint, later = tmp_path / "x/checkpoints/step-00000008" / MANIFEST, before + 3600
        os.utime(checkpoint, (before - 80_000, before - 80_000))
        gauges.send()
        assert values(path.read_text())["resnet_dist_checkpoint_time_seconds"] >= before
        os.utime(checkpoint, (later, later))
        gauges.show(Entry(5_000, step=10, metrics={"perf/images_per_second": 1500.0, "train/loss": 1.0}))
        gauges.show(Entry(6_000, note="a note is no step"))
        gauges.restarted(replace(run, restarts=(Restarted(2, "lost", 8),)))
        with gauges.sent(num_waiting=lambda: 7):  # sends at its begin
            deadline = time.monotonic() + 60
            while values(path.read_text()).get("resnet_dist_unsent_metrics") != 7:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        text = path.read_text()
        found = values(text)
        assert found["resnet_dist_step"] == 10
        assert found["resnet_dist_step_time_seconds"] == 5
        assert found["resnet_dist_total_steps"] == 132
        assert found["resnet_dist_images_per_second"] == 1500
        assert found["resnet_dist_restarts"] == 1
        assert found["resnet_dist_checkpoint_time_seconds"] == checkpoint.stat().st_mtime
        assert set(found) <= set(GAUGES)
        if promtool := shutil.which("promtool"):
            subprocess.run([promtool, "check", "metrics"], input=text, text=True, check=True, timeout=60)
        with file_sinks(path, reports.append) as others:  # of another run
            assert others == []
        assert path.exists()
    assert list(path.parent.glob("*.prom")) == []  # A run that has ended raises no alert.
    assert list(path.parent.glob(".*")) == []
    assert reports == [
        f"{METRICS_VARIABLE}={path}: another run on this machine writes its gauges there, so this one writes none; name a "
        "file for each"
    ]
    with file_sinks(path, reports.append) as sinks:
        assert len(sinks) == 1
    with file_sinks(None, reports.append) as sinks:
        assert sinks == []


def test_a_sink_that_fails_is_reported_once_and_tried_again(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Mapping[str, float]] = []

    def sink(name: str, sent: Mapping[str, float]) -> None:
        seen.append(sent)
        if len(seen) < 3:
            raise RuntimeError("the metrics agent has gone")

    gauges = RunGauges(run, 132, [sink])
    for _ in range(3):
        gauges.send()
    assert len(seen) == 3
    assert (
        caplog.text.count("the gauges for Prometheus are not sent now: RuntimeError: the metrics agent") == 1
    )


@pytest.mark.parametrize("name", ["x.txt", "missing/x.prom"])
def test_a_file_that_no_collector_reads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(METRICS_VARIABLE, str(tmp_path / name))
    with pytest.raises(
        UserError, match=f"{METRICS_VARIABLE}=.*{name}: use a file NAME.prom in a folder that"
    ):
        metrics_file()
