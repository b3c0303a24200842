"""Read runs back from a tracker: those of an experiment, one by its name or id, and the history of a metric."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import mlflow
from mlflow.entities import Experiment, Run
from mlflow.exceptions import MlflowException

from resnet_dist.errors import UserError
from resnet_dist.system.limit import within
from resnet_dist.tracking.logged_run import TOP1, LoggedRun, Point
from resnet_dist.tracking.mlflow.browse.links import experiment_link, run_link
from resnet_dist.tracking.mlflow.browse.view import VIEW, VIEW_TAG
from resnet_dist.tracking.mlflow.database.check import check_database
from resnet_dist.tracking.mlflow.database.connect import connect
from resnet_dist.tracking.mlflow.database.relocate import relocate
from resnet_dist.tracking.mlflow.failure import explain
from resnet_dist.tracking.mlflow.run import place_of
from resnet_dist.tracking.store import (
    TrackerAway,
    TrackerRefuses,
    is_database,
    sqlite_file,
    tracking_uri,
    without_password,
)

ANSWER_SECONDS = 30.0
MAX_PER_REQUEST = 1000  # runs; MLflow's limit is higher, a server's memory is not
MIN_ID = 6  # characters of an id that are enough to name a run
BEST_FIRST = f"metrics.`{TOP1}` DESC"
NEWEST_FIRST = "attributes.start_time DESC"

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Tracker:
    """A store of runs, opened to read. Every call raises UserError for a mistake, TrackerRefuses where the tracker refuses
    this person, and TrackerAway for an outage."""

    client: mlflow.MlflowClient
    uri: str

    @classmethod
    def open(cls, output: Path) -> Tracker:
        """Open the store of an output, or the one that the environment names. Creates nothing."""
        uri = tracking_uri(output)
        file = sqlite_file(uri)
        if file is not None and not file.exists():
            raise UserError(f"{file}: no runs yet; `resnet-dist train` makes it")
        check_database(uri)
        client = _asked(uri, lambda: connect(uri))
        relocate(uri, output)
        return cls(client, uri)

    @property
    def place(self) -> str:
        """The store, without a password, as messages name it."""
        return place_of(self.uri)

    def page_of(self, run: LoggedRun) -> str:
        """Return the address of the run's page; empty where no server shows one."""
        if is_database(self.uri):
            return ""
        return run_link(without_password(self.uri), run.experiment_id, run.run_id)

    def page_of_experiment(self, name: str) -> str:
        """Return the address of the page of an experiment, on a server, with its saved view if it has one.

        Raises UserError where there is no such experiment.
        """
        found = self.experiment(name)
        view = VIEW if VIEW_TAG in found.tags else None
        return experiment_link(without_password(self.uri), found.experiment_id, view)

    def experiments(self) -> list[Experiment]:
        """Return the experiments that are not deleted."""
        return self._all(lambda token: self.client.search_experiments(page_token=token))

    def experiment(self, name: str | None) -> Experiment:
        """Return the experiment of that name, or that of the newest run. Raises UserError where there is none."""
        known = {found.name: found for found in self.experiments()}
        if name is not None:
            if name in known:
                return known[name]
            raise UserError(
                f"--experiment {name!r}: {self.place} has no such experiment{nearest(name, known)}"
            )
        newest = self._search(list(known.values()), "", NEWEST_FIRST, 1)
        if not newest:
            raise UserError(f"{self.place} has no runs yet; `resnet-dist train` begins one")
        return next(found for found in known.values() if found.experiment_id == newest[0].experiment_id)

    def runs(
        self,
        experiments: Sequence[Experiment],
        query: str = "",
        limit: int | None = None,
        order: str = BEST_FIRST,
    ) -> list[LoggedRun]:
        """Return the runs of experiments that a query in MLflow's syntax selects, at most `limit` of them."""
        return self._search(experiments, query, order, limit)

    def find(self, name: str) -> LoggedRun:
        """Return the run with this name, id, or beginning of an id. Raises UserError where there is none, or several."""
        experiments = self.experiments()
        # MLflow knows no escapes in a quoted name.
        mark = next((mark for mark in "'\"" if mark not in name), None)
        query = f"attributes.run_name = {mark}{name}{mark}"
        found = self._search(experiments, query, NEWEST_FIRST, None) if mark else []
        if not found:
            known = self._search(experiments, "", NEWEST_FIRST, None)
            if not known:
                raise UserError(f"{self.place} has no runs yet; `resnet-dist train` begins one")
            found = [run for run in known if run.name == name]
            found = found or [run for run in known if len(name) >= MIN_ID and run.run_id.startswith(name)]
            if not found:
                names = list(dict.fromkeys(run.name for run in known))
                raise UserError(f"{self.place} has no run named {name}{nearest(name, names)}")
        if len(found) > 1:
            which = ", ".join(f"{run.run_id} in {run.experiment}" for run in found[:5])
            raise UserError(f"{len(found)} runs are named {name}: {which}; give the id of one")
        return found[0]

    def history(self, run: LoggedRun, metric: str) -> list[Point]:
        """Return all values of a metric, by step."""
        found = _asked(self.uri, lambda: self.client.get_metric_history(run.run_id, metric))
        return sorted((Point(one.step, one.value) for one in found), key=lambda point: point.step)

    def close(self, run: LoggedRun, state: str) -> None:
        """Set the final state of a run."""
        _asked(self.uri, lambda: self.client.set_terminated(run.run_id, state))

    def _search(
        self, experiments: Sequence[Experiment], query: str, order: str, limit: int | None
    ) -> list[LoggedRun]:
        if not experiments:
            return []
        names = {experiment.experiment_id: experiment.name for experiment in experiments}

        def page(token: str | None) -> Sequence[Run]:
            size = min(limit or MAX_PER_REQUEST, MAX_PER_REQUEST)
            # The store refuses an order that is named twice.
            orders = list(dict.fromkeys((order, NEWEST_FIRST)))
            return self.client.search_runs(  # type: ignore[no-any-return]
                list(names), query, order_by=orders, max_results=size, page_token=token
            )

        found = self._all(page, limit)
        return [_logged(run, names[run.info.experiment_id]) for run in found]

    def _all(self, page: Callable[[str | None], Sequence[Answer]], limit: int | None = None) -> list[Answer]:
        """Return the items of all pages of an answer, at most `limit` of them."""
        items: list[Answer] = []
        token: str | None = None
        while True:
            answer = _asked(self.uri, partial(page, token))
            items += answer
            token = getattr(answer, "token", None)
            if not token or (limit is not None and len(items) >= limit):
                return items if limit is None else items[:limit]


def nearest(name: str, known: Sequence[str] | dict[str, object]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known ones, or the first of all."""
    near = (
        difflib.get_close_matches(name, known, n=3, cutoff=0.5) or [one for one in known if name in one][:3]
    )
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; it has {', '.join(list(known)[:5])}{', …' if len(known) > 5 else ''}"


def _asked(uri: str, call: Callable[[], Answer]) -> Answer:
    """Return the answer of a store. Raises UserError where the question or the address is a mistake, else TrackerAway."""
    try:
        return within(ANSWER_SECONDS, call)
    except UserError:
        raise
    except TimeoutError as error:
        raise TrackerAway(f"{place_of(uri)}: {error}") from None
    except MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise UserError(_first_line(error)) from None
        _raise_failure(error, uri)
    except Exception as error:  # A server, and a driver of a database, may fail in any way.
        _raise_failure(error, uri)


def _raise_failure(error: Exception, uri: str) -> NoReturn:
    failure = explain(error, uri)
    kind = TrackerRefuses if failure.is_mistake else TrackerAway
    raise kind(f"{place_of(uri)}: {failure.reason}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _logged(run: Run, experiment: str) -> LoggedRun:
    info, data = run.info, run.data
    return LoggedRun(
        info.run_id,
        info.run_name or info.run_id,
        experiment,
        info.experiment_id,
        str(info.status),
        info.start_time,
        info.end_time,
        dict(data.params),
        dict(data.metrics),
        dict(data.tags),
        info.artifact_uri or "",
    )
