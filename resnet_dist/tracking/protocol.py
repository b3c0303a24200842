"""The publishers that the driver works with: one for a run, one for a study or sweep, and how each is opened.

The loop has an interface of its own, train.tracker.Tracker: ranks report to it and never wait for a server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from resnet_dist.config import Recipe
from resnet_dist.runs.folder import RunFolder, Status
from resnet_dist.tracking.spool import Entry


@dataclass(frozen=True)
class RunRecord:
    """Everything that a publisher shows of a run besides its metrics and its model."""

    run: RunFolder
    recipe: Recipe
    output: Path
    start_ms: int | None = None  # the time when the run began; None: now

    @property
    def tags(self) -> Mapping[str, str]:
        return self.run.tags


class Described(Protocol):
    """The part of a study or a sweep that MLflow shows with its parent run."""

    @property
    def experiment(self) -> str: ...

    @property
    def description(self) -> str: ...


@dataclass(frozen=True)
class GroupRecord:
    """Everything that a publisher shows of a study or a sweep besides its files."""

    described: Described
    name: str
    folder: Path
    source: str  # the job or recipe file, as it was typed
    output: Path


class Publisher(Protocol):
    """Publishes one attempt of a run: to MLflow, or to the terminal alone where MLflow is not installed.

    What gets the metrics of a run beside it, such as TensorBoard, is no Publisher, but a store in tracking/also: to add
    W&B, Aim or another one, write a class with the calls of `also.sending.FileStore` (newest_steps: what it has already;
    log_metrics; close), and name it in `also.choose.STORES`. It gets every value once, over restarts and outages,
    because it is followed by a Backlog of the spool as MLflow is.

    Only opening a publisher may raise, for a person's mistake. Every other failure is reported and never stops the
    training: `unsent` counts what it has left.
    """

    @property
    def run_id(self) -> str | None:
        """The run's id in MLflow; None without MLflow, and before its server has answered."""

    @property
    def unsent(self) -> tuple[str, ...]:
        """The things that MLflow did not get, in words such as "12 metrics" and "the model"; complete after `close`."""

    def num_waiting(self) -> int:
        """Return the number of metrics that MLflow has not got yet. Never waits."""

    def start(self) -> None:
        """Begin to follow the run's spool."""

    def describe_attempt(self, run: RunFolder) -> None:
        """Show which attempt trains now, and the restarts of the run with their causes and seconds. Never waits."""

    def finish(self, timeout_seconds: float) -> None:
        """Send the rest of the spool, for no longer than the timeout."""

    def log_results(self, checkpoint: str | None) -> None:
        """Publish the gradient norms, and the model of the run's checkpoint of that name unless it is None."""

    def close(self, status: Status, timeout_seconds: float) -> None:
        """Close the run with its status; wait no longer than the timeout."""

    def abandon(self) -> None:
        """Publish nothing more, and leave the run open: another driver publishes it now."""


class GroupPublisher(Protocol):
    """Publishes a study or a sweep: the runs that belong together, their figure, table and conclusion.

    As with Publisher, only opening it may raise.
    """

    @property
    def unsent(self) -> tuple[str, ...]:
        """The things that MLflow did not get, in words such as "the conclusion"; complete after `close`."""

    def member_tags(self) -> dict[str, str]:
        """Return the tags that make a run one of the group."""

    def is_finished(self, run_id: str) -> bool:
        """Report whether the run was closed as FINISHED; false for an unknown run, and where MLflow does not answer."""

    def log_files(self, *files: Path) -> None: ...

    def close(self, status: Status, conclusion: str) -> None:
        """Publish the conclusion and close the parent run with its status."""


OpenPublisher = Callable[[RunRecord, Callable[[Entry], None]], Publisher]
OpenGroup = Callable[[GroupRecord], GroupPublisher]
