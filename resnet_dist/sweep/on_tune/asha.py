"""ASHA of Ray Tune, which stops trials early: those that it stops save first, and it remembers earlier processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from resnet_dist.sweep.on_tune.settings import set_defaults

set_defaults()

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from resnet_dist.sweep.trial import PROGRESS, Report
from resnet_dist.sweep.watch import Watch

REDUCTION = 3  # ASHA lets the best third of the trials go on at each of 1/9 and 1/3 of their length.


@dataclass
class _Named:
    """A trial as ASHA needs it: by a name that it has in the next process too."""

    trial_id: str


class GentleAsha(ASHAScheduler):
    """ASHA by the names of trials. One that it stops runs until it has saved and closed its run."""

    def __init__(self, metric: str, mode: str, watch: Watch | None) -> None:
        super().__init__(
            time_attr="progress",
            metric="value",
            mode=mode,
            max_t=PROGRESS,
            grace_period=PROGRESS // REDUCTION**2,
            reduction_factor=REDUCTION,
        )
        self._watch, self._shown_metric = watch, metric
        self._stopped: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def remember(self, name: str, reports: Sequence[Report]) -> None:
        """Take what a trial had reported in an earlier process."""
        super().on_trial_add(None, _Named(name))
        for report in reports:
            super().on_trial_result(None, _Named(name), dict(report))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _named(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = _named(trial)
        if name.trial_id in self._stopped or result.get("done"):
            return str(TrialScheduler.CONTINUE)
        if super().on_trial_result(tune_controller, name, result) == TrialScheduler.STOP:
            self._stopped.add(name.trial_id)
            assert self._watch is not None
            self._watch.stop(
                name.trial_id,
                f"ASHA stopped it at step {result['step']}: {self._shown_metric} {result['value']:.4g} is not among the "
                "best third there",
            )
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        name = _named(trial)
        if name.trial_id in self._stopped:  # The steps that it took while it saved count for no other.
            self.on_trial_remove(tune_controller, trial)
        else:
            super().on_trial_complete(tune_controller, name, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        with suppress(KeyError):
            super().on_trial_remove(tune_controller, _named(trial))


def _named(trial: Any) -> _Named:
    return _Named(trial.config["trial"])


def scheduler_of(
    name: str, metric: str, mode: str, watch: Watch, earlier: Callable[[], Mapping[str, Sequence[Report]]]
) -> TrialScheduler:
    """Return the scheduler of that name. earlier: returns what trials reported in earlier processes, by name."""
    if name != "asha":
        return FIFOScheduler()
    asha = GentleAsha(metric, mode, watch)
    for trial, reports in earlier().items():
        asha.remember(trial, reports)
    return asha
