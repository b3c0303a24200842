"""The trials that ASHA stops, also after a restart. No Ray is started."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

from resnet_dist.sweep.on_tune.asha import GentleAsha, scheduler_of
from resnet_dist.sweep.watch import Watch


def trial(name: str) -> Any:
    return SimpleNamespace(trial_id=f"random-{name}", config={"trial": name})


def report(progress: int, value: float) -> dict[str, Any]:
    return {"progress": progress, "value": value, "step": progress}


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


def test_tune_can_pickle_its_state(watch: Watch) -> None:
    """Tune writes it beside its trials, and the watch has a lock."""
    assert pickle.loads(pickle.dumps(asha(watch))) is not None
