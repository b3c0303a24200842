"""Open a publisher: that of MLflow where MLflow is installed, that of the console elsewhere; refuse mistakes."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import time_ns

from resnet_dist.errors import UserError
from resnet_dist.tracking.protocol import GroupPublisher, GroupRecord, Publisher, RunRecord
from resnet_dist.tracking.spool import Entry
from resnet_dist.tracking.store import check_tracking_uri, tracking_uri

MAX_EXPERIMENT = 500  # characters of a name; MLflow's limit


def has_mlflow() -> bool:
    """Report whether MLflow is installed.

    It is not imported for that: a broken installation must raise its own error later.
    """
    return find_spec("mlflow") is not None


def check_tracker(output: Path, experiment: str) -> None:
    """Raise UserError where the address, the database or the name of the experiment is a person's mistake.

    No server is asked: one that does not answer is no mistake.
    """
    check_tracking_uri()
    if not has_mlflow():
        return
    from resnet_dist.tracking.mlflow.database.check import check_database

    check_database(tracking_uri(output))
    if len(experiment) > MAX_EXPERIMENT:
        raise UserError(
            f"experiment={experiment[:40] + '…'!r} has {len(experiment)} characters; MLflow takes {MAX_EXPERIMENT}"
        )


def open_publisher(record: RunRecord, on_entry: Callable[[Entry], None]) -> Publisher:
    """Open the publisher of a run; `on_entry` receives each new entry of its spool.

    Raises UserError where the MLflow store cannot be used by a person's mistake.
    """
    if has_mlflow():
        from resnet_dist.tracking.mlflow.publisher import MlflowPublisher

        return MlflowPublisher(record, on_entry)
    from resnet_dist.tracking.console import ConsolePublisher

    note = f"MLflow is not installed: metrics go to {record.run.spool} alone"
    on_entry(Entry(time_ns() // 1_000_000, note=note))
    return ConsolePublisher(record.run.spool, on_entry)


def open_group(record: GroupRecord) -> GroupPublisher:
    """Open the MLflow run that the runs of a study or sweep are children of.

    Raises UserError where MLflow is not installed, or cannot be used by a person's mistake.
    """
    if not has_mlflow():
        raise UserError("MLflow, where the runs of a study lie together, is not installed")
    from resnet_dist.tracking.mlflow.group import MlflowGroup

    return MlflowGroup(record)
