"""The run folder: what a run is called, which recipe it has, and whether an attempt may continue it.

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

Status = Literal["FINISHED", "FAILED", "KILLED"]  # of an attempt, as MLflow calls them

RUN_FILE = "run.json"
SPOOL_FILE = "spool.jsonl"
STOP_FILE = "stop"
LOCK_FILE = "lock"
CHECKPOINTS_FOLDER = "checkpoints"


@dataclass(frozen=True)
class RunFolder:
    path: Path
    name: str
    run_id: str | None  # of MLflow, once it exists there
    attempt: int
    recipe: dict[str, object]
    key: str = ""  # of this run alone: a driver that died finds by it what it had made in MLflow
    data: tuple[str, ...] = ()  # digests of the indexes that it was started on
    launch: str = ""  # torchrun's name for its own run: an attempt that it restarts is told by it

    @property
    def spool(self) -> Path:
        return self.path / SPOOL_FILE

    @property
    def stop_file(self) -> Path:
        return self.path / STOP_FILE

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS_FOLDER

    def spool_size(self) -> int:
        """Bytes; it grows when ranks begin."""
        return self.spool.stat().st_size if self.spool.exists() else 0

    def with_run_id(self, run_id: str | None) -> RunFolder:
        return replace(self, run_id=run_id or self.run_id)

    def with_data(self, digests: Sequence[str]) -> RunFolder:
        """Raises UserError where the run was started on other data."""
        if self.data and tuple(self.data) != tuple(digests):
            raise UserError(
                f"run {self.name} was started on other data than data.train={self.recipe_field('data.train')} and "
                f"data.eval={self.recipe_field('data.eval')} hold now; give a new --name, or the same shards"
            )
        return replace(self, data=tuple(digests))

    def recipe_field(self, key: str) -> object:
        return Recipe.model_validate(self.recipe).flat()[key]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One attempt at a time. The kernel lets go of the lock of a driver that dies."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"run {self.name} is being trained by another process; wait for its end, or give another --name"
            ) from None
        except NotImplementedError:
            pass  # a file system without locks
        try:
            yield
        finally:
            if not (self.path / RUN_FILE).exists():  # nothing came of it
                self.remove()
            lock.release()

    def remove(self) -> None:
        """Forget a run that did not come to be."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # unless there are others
            self.path.parent.rmdir()

    def write(self) -> None:
        """Create or update the folder; ranks compare this file to see whether they share the storage."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.stop_file.unlink(missing_ok=True)  # of an attempt that was stopped
        value = {key: value for key, value in asdict(self).items() if key != "path"}
        write_text_atomically(self.path / RUN_FILE, json.dumps(value, indent=1) + "\n")


def read_run(path: Path) -> RunFolder | None:
    """The run in a folder; None where there is none. Raises UserError where run.json cannot be read."""
    try:
        return RunFolder(path=path, **json.loads((path / RUN_FILE).read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / RUN_FILE}: not a run ({error})") from None
