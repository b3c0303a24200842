"""An experiment of Ray Tune: start the trials of a sweep as actors that share the machines, and end them with it."""

from __future__ import annotations

import os
import tempfile
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnet_dist.sweep.on_tune.settings import set_defaults

set_defaults()

from ray import tune
from ray.tune.schedulers import TrialScheduler

from resnet_dist.driver.request import Request
from resnet_dist.errors import RankFailed
from resnet_dist.sweep.on_tune.actor import SIGN_PREFIX, TrialActor, orders_of, shown_to_nodes
from resnet_dist.sweep.plan import Outcome
from resnet_dist.sweep.room import Room
from resnet_dist.sweep.watch import Watch
from resnet_dist.system.locks import own_folder
from resnet_dist.system.signals import StopRequest, handle_signals

JOIN_SECONDS = 0.2


class _OfWatch:
    """A part that Tune pickles with its state, which nobody reads: without the watch, which has a lock."""

    def __init__(self, watch: Watch | None = None) -> None:
        self.watch = watch

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Reports(_OfWatch, tune.Callback):
    """Hands what Tune hears of its trials to the watch."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        assert self.watch is not None
        self.watch.started(trial.config["trial"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        assert self.watch is not None
        self.watch.reported(trial.config["trial"], result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        assert self.watch is not None
        error = next(iter(str(trial.get_error() or "").split("\n")), "")
        self.watch.ended(trial.config["trial"], Outcome("failed", reason=f"its process ended: {error}"))


class EndWhenStopped(_OfWatch, tune.Stopper):
    """Ends the experiment once its trials have stopped by themselves: Tune would kill those that still save."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.watch is not None and self.watch.is_stopped


def run_trials(
    requests: Mapping[str, Request],
    metric: str,
    stop_file: Path,
    *,
    scheduler: TrialScheduler,
    room: Room,
    watch: Watch,
    max_restarts: int,
) -> bool:
    """Run all trials to their ends; report whether they were interrupted.

    The first signal requests a checkpoint of each; a second one, or the end of the grace time, gives them up. Raises
    RankFailed where Tune itself fails.
    """
    files = Path(tempfile.gettempdir()) / f"resnet-dist-{os.getuid()}" / "tune"
    name = uuid.uuid4().hex
    sign = stop_file.with_name(f"{SIGN_PREFIX}{name}")
    actor = tune.with_parameters(TrialActor, **orders_of(requests, metric, stop_file, sign))
    # Own the folder first: Tune writes into it as soon as it is given it.
    with own_folder(files / name), shown_to_nodes(sign):
        tuner = tune.Tuner(
            tune.with_resources(actor, tune.PlacementGroupFactory([room.of_actor()])),
            param_space={"trial": tune.grid_search(list(requests))},
            tune_config=tune.TuneConfig(
                scheduler=scheduler, max_concurrent_trials=room.concurrent, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=str(files),
                stop=EndWhenStopped(watch),
                callbacks=[Reports(watch)],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=max_restarts),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        return _fit(tuner, watch)


def _fit(tuner: tune.Tuner, watch: Watch) -> bool:
    stop, box = StopRequest(), list[BaseException]()

    def request_stop(count: int) -> None:
        stop.request(count)
        watch.stop_all()

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:  # It is raised again in the main thread.
            box.append(error)

    # In the main thread, fit() would replace the handlers of signals.
    thread = threading.Thread(target=fit, name="ray-tune", daemon=True)
    with handle_signals(request_stop):
        thread.start()
        while thread.is_alive() and not stop.expired():
            thread.join(JOIN_SECONDS)
            watch.request_stops()
    if box and not stop.requested():
        raise RankFailed(f"Ray Tune ended: {next(iter(str(box[0]).splitlines()), type(box[0]).__name__)}")
    return stop.requested()
