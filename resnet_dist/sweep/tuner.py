"""Ray Tune: draw the trials, start them as actors that share the machines, and choose those that are stopped early.

Tune decides, and this package carries out: a trial that the scheduler stops saves a checkpoint and closes its run before
it ends, and a sweep that is continued gets what it had seen.
"""

from __future__ import annotations

import os
import platform
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from resnet_dist.launch.on_ray.settings import set_defaults

set_defaults()
# Nothing of the sweep is read from Tune's files, so it need not write any but its own state.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# A trial may end before its first evaluation.
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
# The newer output prints its configuration also where it is asked to be silent.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"

import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search.variant_generator import generate_variants

from resnet_dist.driver.request import Reporter, Request, Summary
from resnet_dist.driver.run import run_training
from resnet_dist.errors import RankFailed, UserError
from resnet_dist.sweep.plan import Outcome
from resnet_dist.sweep.room import Room
from resnet_dist.sweep.search import Search, num_combinations
from resnet_dist.sweep.trial import TrialRun
from resnet_dist.sweep.watch import Watch
from resnet_dist.system.locks import own_folder
from resnet_dist.system.provenance import origin_variables
from resnet_dist.system.signals import StopRequest, handle_signals
from resnet_dist.tracking.also.beside import with_others
from resnet_dist.tracking.open import open_publisher

JOIN_SECONDS = 0.2
END_SECONDS = 20.0  # for a training to end in an actor that is taken away
MAX_IN_VAIN = 1000  # draws that give no new trial, after which there are no more
SIGN_PREFIX = ".shared-"  # of a file in the folder of the sweep while its trials run
MLFLOW_PREFIX = "MLFLOW_"  # variables that the processes of trials need, on other machines too


def draw(searches: Sequence[Search], seed: int, num: int) -> list[tuple[str, ...]]:
    """Draw different trials, each as `--set` texts. Raises UserError where there are not so many."""
    possible = num_combinations(searches)
    if num > possible:
        raise _too_many(num, int(possible))
    space = {search.field: _domain(search) for search in searches}
    random, drawn, in_vain = np.random.RandomState(seed), dict[tuple[str, ...], None](), 0
    while len(drawn) < num and in_vain < MAX_IN_VAIN * num:
        _, values = next(generate_variants(space, random_state=random))
        sets = tuple(f"{search.field}={search.text_of(values[search.field])}" for search in searches)
        in_vain = in_vain + 1 if sets in drawn else 0
        drawn[sets] = None
    if len(drawn) < num:  # A narrow range has few numbers of four digits.
        raise _too_many(num, len(drawn))
    return list(drawn)


def _too_many(num: int, possible: int) -> UserError:
    return UserError(
        f"--trials {num}: the searches have {possible} different trials; give --trials {possible}"
    )


def _domain(search: Search) -> Any:
    """Return the search space of Tune for one field."""
    match search.form:
        case "log":
            return tune.loguniform(search.low, search.high)
        case "uniform":
            return tune.uniform(search.low, search.high)
        case "int":
            return tune.randint(int(search.low), int(search.high) + 1)
        case "list":
            return tune.choice(list(search.choices))


class TrialActor(tune.Trainable):
    """The process that trains trials, one after another; each call of `step` returns its next report."""

    def setup(self, config: dict[str, Any], **orders: Any) -> None:
        os.environ.update(orders["variables"])
        if ray.get_runtime_context().get_node_id() != orders["node"]:  # It cannot see the origin itself.
            os.environ.update(orders["origin"])
        # Another machine may not have the folder; the path of the recipe file is relative to it.
        with suppress(OSError):
            os.chdir(orders["folder"])
        self._orders = orders
        self._trial: TrialRun | None = None
        self._next: str | None = config["trial"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        if self._trial is not None and not self._trial.has_ended:
            return False  # It hangs: the next trial gets a process of its own.
        self._trial, self._next = None, new_config["trial"]
        return True

    def step(self) -> dict[str, Any]:
        # Not in `setup`: Tune reports the start of a trial after it, and a stop is requested of those that have started.
        if self._next is not None:
            self._begin(self._next)
            self._next = None
        return {"done": True} if self._trial is None else self._trial.next_report()

    def cleanup(self) -> None:
        if self._trial is not None:
            self._trial.join(END_SECONDS)

    def _begin(self, name: str) -> None:
        request: Request = self._orders["requests"][name]
        is_stopped = Path(self._orders["stop_file"]).exists()
        train = partial(train_trial, Path(self._orders["sign"]))
        self._trial = None if is_stopped else TrialRun(request, self._orders["metric"], train)


def train_trial(sign: Path, request: Request, reporter: Reporter) -> Summary:
    """Train a trial to its end. sign: a file of the driver. Raises RankFailed where this node does not have it."""
    if not sign.exists():
        raise RankFailed(
            f"{platform.node()} does not share {sign.parent} with the driver; --output must be a folder that all nodes share"
        )
    return run_training(request, reporter, with_others(open_publisher))


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
    actor = tune.with_parameters(TrialActor, **_orders(requests, metric, stop_file, sign))
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
    with own_folder(files / name), shown_to_nodes(sign):
        return _fit(tuner, watch)


@contextmanager
def shown_to_nodes(sign: Path) -> Iterator[None]:
    """Keep a file by which a node sees that it shares the folder; remove those of commands that were killed."""
    for left in (sign, *sign.parent.glob(f"{SIGN_PREFIX}*")):
        left.unlink(missing_ok=True)
    sign.touch()
    try:
        yield
    finally:
        with suppress(OSError):
            sign.unlink()


def _orders(requests: Mapping[str, Request], metric: str, stop_file: Path, sign: Path) -> dict[str, Any]:
    variables = {name: value for name, value in os.environ.items() if name.startswith(MLFLOW_PREFIX)}
    source = next(iter(requests.values())).source
    return {
        "node": ray.get_runtime_context().get_node_id(),
        # What a submitted sweep was given itself comes first.
        "origin": {
            name: os.environ.get(name, value) for name, value in origin_variables(Path(source)).items()
        },
        "sign": str(sign),
        "requests": dict(requests),
        "metric": metric,
        "stop_file": str(stop_file),
        "variables": variables,
        "folder": os.getcwd(),
    }


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
