"""The end of an experiment, and what the watch hears of its trials. No Ray is started."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from resnet_dist.sweep.on_tune.experiment import EndWhenStopped, Reports
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
