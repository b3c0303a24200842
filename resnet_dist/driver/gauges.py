"""The state of a run as gauges for Prometheus, read from its journal and storage by a thread of the driver.

Nothing listens for that: Ray exports them with its own metrics, and a file, where METRICS_VARIABLE names one, is for
the textfile collector of Prometheus' node exporter.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RunFolder
from resnet_dist.system.files import write_text_atomically
from resnet_dist.system.locks import LockHeld, hold_lock
from resnet_dist.tracking.spool import Entry
from resnet_dist.train.checkpoint.folder import MANIFEST, list_checkpoints

log = logging.getLogger(__name__)

METRICS_VARIABLE = "RESNET_DIST_METRICS_FILE"
INTERVAL_SECONDS = 15.0
# By name, with the help text that Prometheus shows.
GAUGES = {
    "resnet_dist_step": "Optimizer steps done, as of the newest line of the journal.",
    "resnet_dist_total_steps": "Optimizer steps of the whole run.",
    "resnet_dist_step_time_seconds": "Unix time of the newest step in the journal; at first, of the driver's start.",
    "resnet_dist_checkpoint_time_seconds": "Unix time of the newest checkpoint, or of the driver's start if that is later.",
    "resnet_dist_images_per_second": "Images trained on each second, by all ranks.",
    "resnet_dist_data_wait_fraction": "Part of its time that rank 0 waits for data.",
    "resnet_dist_restarts": "Restarts of the run's ranks since it began.",
    "resnet_dist_unsent_metrics": "Metrics that the tracker has not got yet.",
}
_FROM_JOURNAL = {
    "perf/images_per_second": "resnet_dist_images_per_second",
    "perf/data_wait_fraction": "resnet_dist_data_wait_fraction",
}

Sink = Callable[[str, Mapping[str, float]], None]  # Takes the name of a run, and the gauges' values.


class RunGauges:
    """The gauges of one run, sent to `sinks` every INTERVAL_SECONDS.

    A sink that fails is reported once, and never ends the training.
    """

    def __init__(self, run: RunFolder, total_steps: int, sinks: Sequence[Sink]) -> None:
        self._run, self._sinks = run, sinks
        self._num_waiting: Callable[[], int] = lambda: 0
        self._start = start = time.time()
        self._values = {
            "resnet_dist_total_steps": float(total_steps),
            "resnet_dist_step_time_seconds": start,
            "resnet_dist_checkpoint_time_seconds": start,
        }
        self._newest_step = 0
        self._failed = False
        self._stop = threading.Event()
        # A daemon thread: a storage that does not answer must not keep the process alive.
        self._thread = threading.Thread(target=self._follow, name="gauges", daemon=True)

    def show(self, entry: Entry) -> None:
        """Take the values of an entry of the journal."""
        fresh = {gauge: entry.metrics[name] for name, gauge in _FROM_JOURNAL.items() if name in entry.metrics}
        # An evaluation beside training is one of an earlier step.
        if entry.step is not None and entry.metrics and entry.step >= self._newest_step:
            self._newest_step = entry.step
            fresh |= {
                "resnet_dist_step": float(entry.step),
                "resnet_dist_step_time_seconds": entry.time_ms / 1000,
            }
        self._values = {**self._values, **fresh}

    def restarted(self, run: RunFolder) -> None:
        self._run = run
        self._newest_step = 0  # The ranks resume from an earlier one.

    def send(self) -> None:
        """Send all values once."""
        try:
            values = {**self._values, **self._read()}
            for sink in self._sinks:
                sink(self._run.name, values)
            self._failed = False
        except Exception as error:  # Ray, a storage or a full disk may fail in any way; training continues.
            if not self._failed:
                log.warning("the gauges for Prometheus are not sent now: %s: %s", type(error).__name__, error)
            self._failed = True

    def _read(self) -> dict[str, float]:
        values = {
            "resnet_dist_restarts": float(len(self._run.restarts)),
            "resnet_dist_unsent_metrics": float(self._num_waiting()),
        }
        names = list_checkpoints(self._run.checkpoints)
        saved = self._run.checkpoints.modified(f"{names[-1]}/{MANIFEST}") if names else None
        if saved is not None:
            # A run that is resumed a day later loses no more work than since its resumption.
            values["resnet_dist_checkpoint_time_seconds"] = max(self._start, saved)
        return values

    def _follow(self) -> None:
        self.send()
        while not self._stop.wait(INTERVAL_SECONDS):
            self.send()

    @contextmanager
    def sent(self, num_waiting: Callable[[], int]) -> Iterator[None]:
        """Send the gauges from a thread inside the block. num_waiting: returns the number of unsent metrics."""
        if not self._sinks:
            yield
            return
        self._num_waiting = num_waiting
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join(1.0)


def metrics_file() -> Path | None:
    """Return the file that METRICS_VARIABLE names, or None. Raises UserError where it cannot be one."""
    text = os.environ.get(METRICS_VARIABLE, "").strip()
    if not text:
        return None
    path = Path(text).absolute()
    if path.suffix != ".prom" or not path.parent.is_dir():
        raise UserError(
            f"{METRICS_VARIABLE}={text}: use a file NAME.prom in a folder that exists, the one of the node exporter's "
            "textfile collector"
        )
    return path


@contextmanager
def file_sinks(path: Path | None, report: Callable[[str], None]) -> Iterator[list[Sink]]:
    """Yield the sink that writes the gauges to a file; none where no file is named, or another run writes to it.

    Two runs in one file would show the steps of each other, and neither would raise its alerts: that is reported.
    """
    with ExitStack() as stack:
        sinks: list[Sink] = []
        if path is not None and _is_ours(path, stack, report):
            sinks.append(stack.enter_context(_file_sink(path)))
        yield sinks


def _is_ours(path: Path, stack: ExitStack, report: Callable[[str], None]) -> bool:
    """Lock the file until the stack ends; report whether no other process has."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        stack.enter_context(hold_lock(lock, 0))
    except LockHeld:
        report(
            f"{METRICS_VARIABLE}={path}: another run on this machine writes its gauges there, so this one writes none; "
            "name a file for each"
        )
        return False
    stack.callback(lock.unlink, missing_ok=True)
    return True


@contextmanager
def _file_sink(path: Path) -> Iterator[Sink]:
    """Yield a sink that writes the gauges to a file, which ends with the block: a run that has ended raises no alert.

    Where the driver is killed, the file stays, and the run that makes no steps raises one.
    """

    def write(run: str, values: Mapping[str, float]) -> None:
        # ray_: as Ray names them, so that one dashboard and one set of alerts serve both.
        lines = [
            f'# HELP ray_{name} {GAUGES[name]}\n# TYPE ray_{name} gauge\nray_{name}{{run="{run}"}} {value!r}\n'
            for name, value in values.items()
        ]
        write_text_atomically(path, "".join(lines))
        path.chmod(0o644)  # The node exporter is another user.

    try:
        yield write
    finally:
        with suppress(OSError):  # A folder that cannot be written must not fail a finished run.
            path.unlink(missing_ok=True)
