"""The run folder: what a run is called, which recipe it has, and whether an attempt may continue it.

output/runs/NAME/   run.json  spool.jsonl  checkpoints/step-00000120/…
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import ValidationError

from resnet_dist.config import Recipe, UserError
from resnet_dist.config.part import NAME, explain
from resnet_dist.data.tar import write_text_atomically

Status = Literal["FINISHED", "FAILED", "KILLED"]  # of an attempt, as MLflow calls them

RUN_FILE = "run.json"
SPOOL_FILE = "spool.jsonl"
STOP_FILE = "stop"
LOCK_FILE = "lock"

# What a continued run may change, because no sample, gradient or curve depends on it. Every other field, and
# every one that is added to the recipe later, matters: it is for this list to say that one does not. Where a
# set lies may change, what it holds may not: digests of the indexes are compared too.
MAY_CHANGE = frozenset(
    {
        "description",
        "experiment",
        "data.source",
        "data.train",
        "data.eval",
        "data.loader_workers",
        "data.prefetch_batches",
        "data.prefetch_bytes",
        "data.cache",
        "data.shard_cache",
        "data.shard_cache_bytes",
        "data.fetch_timeout_seconds",
        "data.allow_commands",
        "data.max_bad_fraction",
        "train.log_every",
        "train.eval_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.checkpoint_minutes",
        "train.best_metric",  # a change begins a new search for the best
        "train.stall_timeout_seconds",
        "train.log_gradient_norms",
    }
)


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
        return self.path / "checkpoints"

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


def choose_run(output: Path, recipe: Recipe, name: str | None, *, resume: bool) -> RunFolder:
    """The run to start or continue; writes nothing.

    A name that exists is continued. `resume` demands one that exists: the named one, or the newest of this
    recipe's. Raises UserError where there is none, or where the recipe changed what its curve depends on.
    """
    runs = output / "runs"
    if name is not None and not NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r}: use letters, digits, '.', '_' and '-', beginning with one of the first two"
        )
    if resume and name is None:
        name = _newest(runs, recipe)
    if name is None:
        name = _unused(runs, f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}")
    folder = read_run(runs / name)
    if folder is None:
        if resume:
            raise UserError(f"--resume: no run named {name} in {runs}")
        return RunFolder(runs / name, name, None, 1, recipe.model_dump(mode="json"), key=uuid.uuid4().hex)
    _refuse_changes(folder, recipe)
    return replace(folder, attempt=folder.attempt + 1, recipe=recipe.model_dump(mode="json"))


def read_run(path: Path) -> RunFolder | None:
    """The run in a folder; None where there is none. Raises UserError where run.json cannot be read."""
    try:
        return RunFolder(path=path, **json.loads((path / RUN_FILE).read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / RUN_FILE}: not a run ({error})") from None


def run_of_launch(output: Path, recipe: Recipe, launch: str) -> str | None:
    """The newest run of this recipe that the same torchrun has started."""
    return next((run.name for run in _newest_first(output / "runs", recipe) if run.launch == launch), None)


def _newest(runs: Path, recipe: Recipe) -> str:
    for run in _newest_first(runs, recipe):
        return run.name
    raise UserError(f"--resume: no run of {recipe.name!r} in {runs}")


def _newest_first(runs: Path, recipe: Recipe) -> Iterator[RunFolder]:
    for file in sorted(runs.glob(f"*/{RUN_FILE}"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        folder = read_run(file.parent)
        if folder is not None and folder.recipe.get("name") == recipe.name:
            yield folder


def _unused(runs: Path, name: str) -> str:
    candidates = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    return next(candidate for candidate in candidates if not (runs / candidate).exists())


def _refuse_changes(folder: RunFolder, recipe: Recipe) -> None:
    try:
        before = Recipe.model_validate(folder.recipe)
    except ValidationError as error:
        raise UserError(
            f"run {folder.name} was started by another version of resnet_dist ({explain(error, Recipe)}); "
            "give a new --name"
        ) from None
    was, now = before.flat(), recipe.flat()
    changed = [
        f"{key} was {was.get(key)}, is {value}"
        for key, value in now.items()
        if was.get(key) != value and not may_change(key, before, recipe)
    ]
    if changed:
        raise UserError(
            f"run {folder.name} was started with another recipe ({'; '.join(changed)}); "
            "give a new --name, or the same recipe"
        )


def may_change(key: str, before: Recipe, after: Recipe) -> bool:
    """Whether a continued run may have another value of one field."""
    if key == "train.length":
        # The steps that were taken must be those that the new length would have taken: only so where the
        # learning rate does not depend on what is left.
        return before.schedule.decay == after.schedule.decay == "constant"
    return key in MAY_CHANGE
