"""The run folder: the name of a run, its recipe, its files, and the lock that allows one attempt at a time.

output/runs/NAME/   run.json  spool.jsonl  log.txt  checkpoints/step-00000120/…
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from resnet_dist.config import Recipe
from resnet_dist.errors import UserError
from resnet_dist.order.versions import FIRST_VERSION, VERSIONS
from resnet_dist.system.command import sync_advice
from resnet_dist.system.files import write_text_atomically
from resnet_dist.system.locks import LockHeld, hold_lock
from resnet_dist.system.streams import LOG_FILE

# The status of an attempt, in MLflow's names.
Status = Literal["FINISHED", "FAILED", "KILLED"]

RUNS_FOLDER = "runs"  # in the output folder
RUN_FILE = "run.json"
SPOOL_FILE = "spool.jsonl"
STOP_FILE = "stop"  # Its existence requests a stop of the ranks.
LOCK_FILE = "lock"
CHECKPOINTS_FOLDER = "checkpoints"


class RunHeld(UserError):
    """A run that another process trains."""


@dataclass(frozen=True)
class RunFolder:
    """A run and what its run.json records. A value: nothing is on disk before `write` or `lock`."""

    path: Path
    name: str
    run_id: str | None  # of MLflow, once the run exists there
    attempt: int  # 1 for the first
    recipe: dict[str, object]  # without passwords and signatures, see `stored_recipe`
    key: str = ""  # a unique tag in MLflow, by which a restarted driver finds the run that it had created
    data: tuple[str, ...] = ()  # digests of the indexes that the run was started on
    launch: str = ""  # the launch of torchrun, by which a restart of the ranks finds its run
    order: int = FIRST_VERSION  # version of the order of samples, which a run keeps
    # Of the run in MLflow, for one that is created there later.
    tags: dict[str, str] = field(default_factory=dict)
    # MLFLOW_TRACKING_URI without a password; empty: the store in the output folder; None: an earlier version's run
    tracker: str | None = None
    status: Status | None = None  # of the newest attempt; None while it runs, and where its driver died
    unsent: tuple[str, ...] = ()  # what MLflow did not get, in words

    @property
    def spool(self) -> Path:
        return self.path / SPOOL_FILE

    @property
    def log(self) -> Path:
        """The lines of libraries while this run was trained; it exists where there were any."""
        return self.path / LOG_FILE

    @property
    def stop_file(self) -> Path:
        return self.path / STOP_FILE

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS_FOLDER

    def spool_size(self) -> int:
        """Return the bytes of the spool, which grows when rank 0 begins."""
        return self.spool.stat().st_size if self.spool.exists() else 0

    def with_run_id(self, run_id: str | None) -> RunFolder:
        return replace(self, run_id=run_id or self.run_id)

    def ended(self, status: Status, unsent: Sequence[str]) -> RunFolder:
        """Return the run as it is after an attempt; unsent: what MLflow did not get."""
        return replace(self, status=status, unsent=tuple(unsent))

    def with_data(self, digests: Sequence[str]) -> RunFolder:
        """Return the run with the digests of its data.

        Raises UserError where the run was started on other data.
        """
        if self.data and tuple(self.data) != tuple(digests):
            raise UserError(
                f"run {self.name} was started on other data than data.train={self.recipe_field('data.train')} and "
                f"data.eval={self.recipe_field('data.eval')} hold now; give a new --name, or the same shards"
            )
        return replace(self, data=tuple(digests))

    def recipe_field(self, key: str) -> object:
        """Return the value of a recipe field such as "data.train"."""
        return Recipe.model_validate(self.recipe).flat()[key]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of the run, so that one attempt at a time trains it.

        Raises RunHeld where another process holds it. The kernel releases the lock of a driver that dies. A
        run that was never written is removed at the end.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with hold_lock(self.path / LOCK_FILE, 0):
                try:
                    yield
                finally:
                    if not (self.path / RUN_FILE).exists():  # The attempt ended before the run was written.
                        self.remove()
        except LockHeld as held:
            advice = f"; if that process is gone, remove {held.marker}" if held.marker else ""
            raise RunHeld(
                f"run {self.name} is being trained by another process; wait for its end, or give another --name{advice}"
            ) from None

    def remove(self) -> None:
        """Remove the folder of a run that did not begin, and the folder of all runs if it is empty then."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # The folder holds other runs.
            self.path.parent.rmdir()

    def write(self) -> None:
        """Create or update the folder and its run.json; ranks compare that file to check that they share storage."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.stop_file.unlink(missing_ok=True)  # An earlier attempt may have been stopped by it.
        value = {key: value for key, value in asdict(self).items() if key != "path"}
        write_text_atomically(self.path / RUN_FILE, json.dumps(value, indent=1) + "\n")


def unsent_summary(run: RunFolder) -> str:
    """Return the line about what MLflow did not get of a run, with the command that sends it."""
    return f"not sent to MLflow: {', '.join(run.unsent)}; {sync_advice(run.name, run.path.parent.parent)}"


def stored_recipe(recipe: Recipe) -> dict[str, object]:
    """Return a recipe as a run keeps it: JSON without passwords and signatures, which a resumed run is given anew."""
    return recipe.public().model_dump(mode="json")


def read_run(path: Path) -> RunFolder | None:
    """Return the run in a folder; None where there is none.

    Raises UserError where run.json cannot be parsed.
    """
    try:
        value = json.loads((path / RUN_FILE).read_bytes())
        run = RunFolder(path=path, **{**value, "unsent": tuple(value.get("unsent", ()))})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / RUN_FILE}: not a run ({error})") from None
    if run.order not in VERSIONS:
        raise UserError(
            f"{path / RUN_FILE}: the run has version {run.order!r} of the order of samples, this resnet_dist has "
            f"{' and '.join(map(str, VERSIONS))}; continue it with the version of resnet_dist that began it"
        )
    return run
