"""The work beside the ranks of a real run: the upload of metrics to MLflow, and a progress bar on a terminal."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resnet_dist.config import Recipe
from resnet_dist.data.shards.index import read_index
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.store import URI_VARIABLE
from resnet_dist.train.plan import Plan, order_of


@contextmanager
def followed(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Follow the run in `folder` as the driver does, with an MLflow store there and a terminal without a screen.

    Where MLflow or rich is missing, metrics stay in the spool.
    """
    try:
        from rich.console import Console

        from resnet_dist.terminal import make_reporter
        from resnet_dist.tracking.mlflow.publisher import MlflowPublisher
        from resnet_dist.tracking.mlflow.run import CLOSE_SECONDS
        from resnet_dist.tracking.protocol import RunRecord
    except ImportError:
        yield
        return
    os.environ.pop(URI_VARIABLE, None)  # A bench must not write to the user's server.
    # Hide the log lines about each table of the new store.
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)
    with make_reporter(Console(file=io.StringIO(), force_terminal=True), bar=True) as reporter:
        order = order_of(recipe, read_index(recipe.data.train))
        reporter.begin(Plan.of(recipe, order).total)
        run = RunFolder(open_storage(folder), "bench", None, 1, {}, key="bench")
        publisher = MlflowPublisher(RunRecord(run, recipe, folder), reporter.entry)
        publisher.start()
        yield
        publisher.finish(timeout_seconds=30.0)
        publisher.close("FINISHED", CLOSE_SECONDS)
