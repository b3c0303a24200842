"""The process that trains trials, one after another, on any node that shares the folder of the sweep."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from resnet_dist.sweep.on_tune.settings import set_defaults

set_defaults()

import ray
from ray import tune

from resnet_dist.driver.request import Reporter, Request, Summary
from resnet_dist.driver.run import run_training
from resnet_dist.errors import RankFailed
from resnet_dist.sweep.trial import TrialRun
from resnet_dist.system.provenance import origin_variables
from resnet_dist.tracking.also.fan_out import with_others
from resnet_dist.tracking.open import open_publisher

END_SECONDS = 20.0  # for a training to end in an actor that is taken away
SIGN_PREFIX = ".shared-"  # of a file in the folder of the sweep while its trials run
MLFLOW_PREFIX = "MLFLOW_"  # variables that the processes of trials need, on other machines too


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


def orders_of(requests: Mapping[str, Request], metric: str, stop_file: Path, sign: Path) -> dict[str, Any]:
    """Return what every actor of a sweep receives when it starts."""
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
