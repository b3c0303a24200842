"""What goes on beside the ranks of a real run: metrics are uploaded to MLflow, and a bar moves on a terminal."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from resnet_dist.config import Recipe
from resnet_dist.tracking.spool import Entry

Pause = Callable[[], AbstractContextManager[None]]


@contextmanager
def followed(recipe: Recipe, folder: Path, spool: Path, total_steps: int) -> Iterator[Pause]:
    """Follow `spool` as the driver does, with an MLflow store in `folder` and a terminal that nobody looks at.

    Yields what holds the bar still for a while. Without MLflow or rich, metrics go no further than the spool.
    """
    try:
        from resnet_dist.tracking.driver import MlflowTracking
        from resnet_dist.tracking.run import URI_VARIABLE

        bar = _Bar(total_steps)
    except ImportError:
        yield nullcontext
        return
    os.environ.pop(URI_VARIABLE, None)  # this process is the bench's own: it has no business on a server
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)  # not each table of a new store
    tracking = MlflowTracking(
        folder,
        recipe,
        name="bench",
        run_id=None,
        key="bench",
        source="bench step",
        spool=spool,
        tags={},
        on_entry=bar.entry,
    )
    tracking.start()
    with bar:
        yield bar.paused
    tracking.finish(timeout_seconds=30.0)
    tracking.close("FINISHED")


class _Bar:
    """A reporter on a terminal that leads nowhere."""

    def __init__(self, total_steps: int) -> None:
        from rich.console import Console

        nowhere = io.StringIO()  # emptied in pauses
        self._console = Console(file=nowhere, force_terminal=True)
        self._nowhere, self._total_steps = nowhere, total_steps
        self._stack = ExitStack()

    def __enter__(self) -> None:
        from resnet_dist.terminal import make_reporter

        self._reporter = self._stack.enter_context(make_reporter(self._console))
        self._reporter.begin(self._total_steps)

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def entry(self, entry: Entry) -> None:
        self._reporter.entry(entry)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.__exit__()
        self._nowhere.truncate(0)
        yield
        self.__enter__()
