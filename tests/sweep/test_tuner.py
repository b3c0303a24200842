"""Ray Tune's part of a sweep: what it draws, and which trials ASHA stops, also after a restart. No Ray is started."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resnet_dist.errors import UserError
from resnet_dist.sweep.asha import GentleAsha, scheduler_of
from resnet_dist.sweep.search import Search
from resnet_dist.sweep.tuner import EndWhenStopped, Reports, draw
from resnet_dist.sweep.watch import Watch

SEARCHES = (
    Search("optim.lr", "log", 0.01, 1.0),
    Search("optim.momentum", "uniform", 0.5, 0.9),
    Search("seed", "int", 1, 3),
    Search("model.name", "list", choices=("resnet8", "resnet20")),
)


def test_the_seed_decides_and_more_trials_begin_with_the_same() -> None:
    few, many = draw(SEARCHES, 7, 5), draw(SEARCHES, 7, 40)
    assert many[:5] == few
    assert draw(SEARCHES, 8, 5) != few
    assert len(set(many)) == 40
    values = [dict(text.split("=") for text in sets) for sets in many]
    rates = [float(one["optim.lr"]) for one in values]
    assert 0.01 <= min(rates) < 0.1 < max(rates) <= 1
    assert 10 < sum(rate < 0.1 for rate in rates) < 30  # A half of the logarithm
    assert all(0.5 <= float(one["optim.momentum"]) <= 0.9 for one in values)
    assert {one["seed"] for one in values} == {"1", "2", "3"}
    assert {one["model.name"] for one in values} == {"resnet8", "resnet20"}


def test_all_combinations_can_be_drawn_but_no_more() -> None:
    searches = SEARCHES[2:]
    assert len(set(draw(searches, 0, 6))) == 6
    with pytest.raises(UserError, match=r"--trials 7: the searches have 6 different trials; give --trials 6"):
        draw(searches, 0, 7)


def trial(name: str) -> Any:
    return SimpleNamespace(trial_id=f"random-{name}", config={"trial": name})


def report(progress: int, value: float) -> dict[str, Any]:
    return {"progress": progress, "value": value, "step": progress}


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch({}, "eval/top1", tmp_path / ".stop", lambda line: None, lambda name, outcome: None)


def stops_of(watch: Watch) -> dict[str, str]:
    return watch._stops


def asha(
    watch: Watch, mode: str = "max", earlier: dict[str, list[dict[str, Any]]] | None = None
) -> GentleAsha:
    found = scheduler_of("asha", "eval/top1", mode, watch, lambda: earlier or {})
    assert isinstance(found, GentleAsha)
    return found


def test_a_trial_that_is_not_among_the_best_is_stopped_by_the_watch(watch: Watch) -> None:
    scheduler = asha(watch)
    for name, value in (("a", 0.9), ("b", 0.5)):
        scheduler.on_trial_add(None, trial(name))
        # Tune lets it go on: it saves, and ends by itself.
        assert scheduler.on_trial_result(None, trial(name), report(150, value)) == "CONTINUE"
    assert stops_of(watch) == {
        "b": "ASHA stopped it at step 150: eval/top1 0.5 is not among the best third there"
    }
    scheduler.on_trial_result(None, trial("b"), report(350, 0.95))  # while it saves
    scheduler.on_trial_complete(None, trial("b"), {"done": True, "progress": 350, "value": 0.95})
    scheduler.on_trial_result(None, trial("a"), report(350, 0.7))
    scheduler.on_trial_complete(None, trial("a"), {"done": True, "progress": 1000, "value": 0.99})
    assert list(stops_of(watch)) == ["b"]


def test_a_loss_is_better_where_it_is_lower(watch: Watch) -> None:
    scheduler = asha(watch, "min")
    for name, value in (("a", 0.9), ("b", 0.5), ("c", 2.0)):
        scheduler.on_trial_add(None, trial(name))
        scheduler.on_trial_result(None, trial(name), report(150, value))
    assert list(stops_of(watch)) == ["c"]


def test_a_restarted_sweep_decides_as_if_it_had_gone_on(watch: Watch) -> None:
    earlier = {"a": [report(150, 0.9), report(350, 0.95)], "b": [report(150, 0.5)], "c": []}
    scheduler = asha(watch, earlier=earlier)
    assert not stops_of(watch)  # What has ended is not stopped again.
    for name in ("b", "d"):
        scheduler.on_trial_add(None, trial(name))
    scheduler.on_trial_result(None, trial("b"), report(180, 0.4))  # It was measured at this rung already.
    assert not stops_of(watch)
    scheduler.on_trial_result(None, trial("d"), report(150, 0.6))
    assert list(stops_of(watch)) == ["d"]


def test_the_experiment_ends_once_its_trials_have_stopped(watch: Watch) -> None:
    stopper, reports = EndWhenStopped(watch), Reports(watch)
    reports.on_trial_start(0, [], trial("a"))
    watch.stop_all()
    assert not stopper.stop_all()
    reports.on_trial_result(0, [], trial("a"), {"done": True})
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
    for part in (EndWhenStopped(watch), Reports(watch), asha(watch)):
        assert pickle.loads(pickle.dumps(part)) is not None
