"""The end of an experiment, and what the watch hears of its trials. No Ray is started."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resnet_dist.sweep.on_tune import experiment
from resnet_dist.sweep.on_tune.experiment import EndWhenStopped, Reports, run_trials
from resnet_dist.sweep.room import Room
from resnet_dist.sweep.watch import Watch

TRIAL = SimpleNamespace(trial_id="random-a", config={"trial": "a"})


def test_the_experiment_ends_once_its_trials_have_stopped(watch: Watch) -> None:
    stopper, reports = EndWhenStopped(watch), Reports(watch)
    reports.on_trial_start(0, [], TRIAL)
    watch.stop_all()
    assert not stopper.stop_all()
    reports.on_trial_result(0, [], TRIAL, {"done": True})
    assert stopper.stop_all()
    assert not stopper("a", {})


def test_a_process_that_died_is_a_failed_trial(tmp_path: Path) -> None:
    ends: list[Any] = []
    watch = Watch({}, "eval/top1", tmp_path / ".stop", lambda line: None, lambda *end: ends.append(end))
    died = SimpleNamespace(config={"trial": "a"}, get_error=lambda: RuntimeError("The actor died.\nmore"))
    Reports(watch).on_trial_error(0, [], died)
    ((name, outcome),) = ends
    assert (name, outcome.state, outcome.reason) == ("a", "failed", "its process ended: The actor died.")


def test_tune_can_pickle_its_state(watch: Watch) -> None:
    """Tune writes it beside its trials, and the watch has a lock."""
    for part in (EndWhenStopped(watch), Reports(watch)):
        assert pickle.loads(pickle.dumps(part)) is not None


def test_what_tune_writes_when_it_is_set_up_stays_until_the_sweep_ends(
    watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep that begins removes the folders that no process holds, and its own must not be one of them."""
    seen: list[Path] = []

    def written(*arguments: Any, run_config: Any, **options: Any) -> Path:
        folder = Path(run_config.storage_path) / run_config.name
        folder.mkdir(parents=True)
        (folder / "tuner.pkl").touch()
        return folder

    def fit(folder: Path, watch: Watch) -> bool:
        assert (folder / "tuner.pkl").exists()
        seen.append(folder)
        return False

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(experiment, "orders_of", lambda *arguments: {})
    for name in ("with_parameters", "with_resources"):
        monkeypatch.setattr(experiment.tune, name, lambda actor, *arguments, **options: actor)
    monkeypatch.setattr(experiment.tune, "Tuner", written)
    monkeypatch.setattr(experiment, "_fit", fit)
    room, stop_file = Room(1, 1, 1, gpu=False), tmp_path / ".stop"
    scheduler: Any = None
    assert not run_trials(
        {}, "eval/top1", stop_file, scheduler=scheduler, room=room, watch=watch, max_restarts=0
    )
    (folder,) = seen
    assert list(folder.parent.iterdir()) == []
