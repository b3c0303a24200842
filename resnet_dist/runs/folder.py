"""The run folder: the name of a run, its recipe, its files, and the lock that allows one attempt at a time.

output/runs/NAME/   run.json  spool.jsonl  checkpoints/step-00000120/…
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from resnet_dist.config import Recipe
from resnet_dist.errors import UserError
from resnet_dist.system.files import write_text_atomically

# The status of an attempt, in MLflow's names.
Status = Literal["FINISHED", "FAILED", "KILLED"]

RUNS_FOLDER = "runs"  # in the output folder
RUN_FILE = "run.json"
SPOOL_FILE = "spool.jsonl"
RANKS_FILE = "ranks.json"
FAILURES_FILE = "failures.txt"
STOP_FILE = "stop"  # Its existence requests a stop of the ranks.
LOCK_FILE = "lock"
CHECKPOINTS_FOLDER = "checkpoints"


@dataclass(frozen=True)
class RankPlaces:
    """Where the ranks of an attempt are, as rank 0 writes it when they have met."""

    attempt: int
    threads: int  # CPU threads of each rank
    hosts: list[str]  # by rank
    nodes: list[str]  # by rank: Ray's id of the node, or "" without Ray

    def write(self, folder: Path) -> None:
        write_text_atomically(folder / RANKS_FILE, json.dumps(asdict(self), indent=1) + "\n")


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

    @property
    def spool(self) -> Path:
        return self.path / SPOOL_FILE

    @property
    def stop_file(self) -> Path:
        return self.path / STOP_FILE

    @property
    def failures(self) -> Path:
        return self.path / FAILURES_FILE

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS_FOLDER

    def ranks(self) -> RankPlaces | None:
        """Return where the ranks of the newest attempt that began are; None before the first."""
        try:
            return RankPlaces(**json.loads((self.path / RANKS_FILE).read_bytes()))
        except (OSError, ValueError, TypeError):  # None has begun yet, or another version wrote the file.
            return None

    def spool_size(self) -> int:
        """Return the bytes of the spool, which grows when rank 0 begins."""
        return self.spool.stat().st_size if self.spool.exists() else 0

    def with_run_id(self, run_id: str | None) -> RunFolder:
        return replace(self, run_id=run_id or self.run_id)

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

        Raises UserError where another process holds it. The kernel releases the lock of a driver that dies. A
        run that was never written is removed at the end.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"run {self.name} is being trained by another process; wait for its end, or give another --name"
            ) from None
        except NotImplementedError:
            pass  # The file system has no locks: train without one.
        try:
            yield
        finally:
            if not (self.path / RUN_FILE).exists():  # The attempt ended before the run was written.
                self.remove()
            lock.release()

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


def stored_recipe(recipe: Recipe) -> dict[str, object]:
    """Return a recipe as a run keeps it: JSON without passwords and signatures, which a resumed run is given anew."""
    return recipe.public().model_dump(mode="json")


def read_run(path: Path) -> RunFolder | None:
    """Return the run in a folder; None where there is none.

    Raises UserError where run.json cannot be parsed.
    """
    try:
        return RunFolder(path=path, **json.loads((path / RUN_FILE).read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / RUN_FILE}: not a run ({error})") from None
