"""TensorBoard: event files in the run folder, written by torch.utils.tensorboard. They hold each value once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.runs.folder import RunFolder
from resnet_dist.tracking.backlog import MetricPoint

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"  # in the run folder
PREFIX = "events.out.tfevents."
# Seconds between two flushes of the writer's own thread: `log_metrics` flushes by itself.
FLUSH_SECONDS = 3600


class EventFiles:
    """The event files of a run; each process that writes adds one. See backlog.MetricStore.

    TensorBoard reads no bucket without further packages: the files of a run at a URL are written on this machine, and
    copied to the run when it is closed.
    """

    def __init__(self, run: RunFolder) -> None:
        self._storage = run.storage.at(FOLDER)
        self._is_local = Path(self._storage.location) == self._storage.local_folder()
        self._folder = self._storage.local_folder()
        self._writer: SummaryWriter | None = None
        if not self._is_local:  # What a driver that died here has not copied is written again.
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def place(self) -> str:
        """The place of the files while they are written, for messages."""
        return str(self._folder)

    def newest_steps(self) -> dict[str, int]:
        newest: dict[str, int] = {}
        for name, step in self._values():
            newest[name] = max(step, newest.get(name, step))
        return newest

    def log_metrics(self, metrics: Sequence[MetricPoint]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), flush_secs=FLUSH_SECONDS)
        for one in metrics:
            self._writer.add_scalar(one.key, one.value, one.step, one.timestamp / 1000)
        self._writer.flush()

    def close(self) -> None:
        """End the file, and copy it to a run at a URL. Raises StorageError where that fails."""
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        if not self._is_local:
            for path in self._folder.glob(f"{PREFIX}*"):
                self._storage.write(path.name, path.read_bytes())

    def _values(self) -> Iterator[tuple[str, int]]:
        """Yield name and step of every value, also of a file that a killed process has not ended."""
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event

        for found in self._storage.objects():
            content = self._storage.read(found.name)
            if not found.name.startswith(PREFIX) or content is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / found.name
                path.write_bytes(content)
                for record in RawEventFileLoader(str(path)).Load():
                    event = Event.FromString(record)
                    yield from ((value.tag, event.step) for value in event.summary.value)
