"""The stores that a run may have beside MLflow, by the name that `--also` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from resnet_dist.errors import UserError

if TYPE_CHECKING:  # The command line imports this module, and `--help` needs none of these.
    from resnet_dist.runs.folder import RunFolder
    from resnet_dist.tracking.also.sending import FileStore, Sender


@dataclass(frozen=True)
class Also:
    """One kind of store."""

    title: str  # in messages
    module: str  # that must be installed
    extra: str  # of this package, that installs it
    open: Callable[[RunFolder], FileStore]


def _event_files(run: RunFolder) -> FileStore:
    # Here, because no other run needs its imports.
    from resnet_dist.tracking.also.tensorboard import EventFiles

    return EventFiles(run)


STORES = {"tensorboard": Also("TensorBoard", "tensorboard", "tensorboard", _event_files)}


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names without repetitions. Raises UserError for an unknown one."""
    chosen = tuple(dict.fromkeys(names))
    for name in chosen:
        if name not in STORES:
            raise UserError(f"--also {name}: unknown; use {' or '.join(STORES)}")
    return chosen


def check_also(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names as `check_names` does. Raises UserError too for one that is not installed on this machine."""
    chosen = check_names(names)
    for name in chosen:
        if not is_installed(name):
            kind = STORES[name]
            raise UserError(
                f"--also {name}: the Python package {kind.module} is not installed; "
                f"uv pip install 'resnet-dist[{kind.extra}]'"
            )
    return chosen


def is_installed(name: str) -> bool:
    return name in STORES and find_spec(STORES[name].module) is not None


def senders_of(run: RunFolder, report: Callable[[str], None]) -> list[Sender]:
    """Return a sender for each store of a run; one that is not installed on this machine is reported and left out."""
    for name in run.also:
        if not is_installed(name):
            report(f"{name}: not installed here; what the run has of it stays as it is")
    from resnet_dist.tracking.also.sending import Sender

    return [
        Sender(STORES[name].title, run, STORES[name].open, report) for name in run.also if is_installed(name)
    ]
