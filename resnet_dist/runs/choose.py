"""Choose the run to start or resume; refuse a recipe that would change the curve of a run that exists."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from resnet_dist.config import Recipe
from resnet_dist.config.part import NAME, NAME_FORM, explain
from resnet_dist.errors import UserError
from resnet_dist.order.versions import NEWEST_VERSION
from resnet_dist.runs.folder import RUN_FILE, RUNS_FOLDER, RunFolder, read_run, stored_recipe
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Storage

# The fields that a resumed run may change, because no sample, gradient or curve depends on them. Every other
# field must stay the same, including those added to the recipe later: list a field here only if nothing
# depends on it. The location of a data set may change, but not its content: RunFolder.with_data compares the
# digests of the indexes.
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
        "train.best_metric",  # A change starts a new search for the best checkpoint.
        "train.stall_timeout_seconds",
        "train.threads",  # as the number of ranks, it changes the last bits
        "train.deterministic",  # likewise
        "train.log_gradient_norms",
        "train.evaluate",
        "train.log_checkpoints",
        "train.log_node_metrics",
        "train.figures",
    }
)

# Lengths of what a curve depends on. They may be written in another unit: once the data is known, they are compared
# in steps (train.plan.moved_lengths).
COMPARED_IN_STEPS = frozenset(
    {
        "schedule.warmup",
        "schedule.milestones",
        "schedule.whitening_bias",
        "train.ema_every",
        "data.train_sizes",
    }
)

# Ray unpacks the folder that a person sends with a job here; the last part is a checksum of all its files.
_SENT_WITH_JOB = re.compile(r"^/.*/working_dir_files/_ray_pkg_[0-9a-f]+/")


def choose_run(output: Path | str, recipe: Recipe, name: str | None, *, resume: bool) -> RunFolder:
    """Return the run to start or resume; write nothing.

    A run that exists under `name` is resumed. `resume` requires that one exists: the named one, or the newest
    of this recipe. Raises UserError where there is none, or where the recipe changed a field that its curve
    depends on, but for COMPARED_IN_STEPS.
    """
    runs = open_storage(output).at(RUNS_FOLDER)
    if name is not None and not NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: {NAME_FORM}")
    if resume and name is None:
        name = _newest(runs, recipe)
    if name is None:
        name = _unused(runs, f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}")
    folder = read_run(runs.at(name))
    if folder is None:
        if resume:
            raise UserError(f"--resume: no run named {name} in {runs.location}")
        key = uuid.uuid4().hex
        return RunFolder(runs.at(name), name, None, 1, stored_recipe(recipe), key=key, order=NEWEST_VERSION)
    _refuse_changes(folder, recipe)
    return replace(folder, attempt=folder.attempt + 1, recipe=stored_recipe(recipe), status=None, unsent=())


def run_of_launch(output: Path | str, recipe: Recipe, launch: str) -> str | None:
    """Return the name of the newest run of this recipe that the same torchrun has started, or None."""
    newest_first = _newest_first(open_storage(output).at(RUNS_FOLDER), recipe)
    return next((run.name for run in newest_first if run.launch == launch), None)


def _newest(runs: Storage, recipe: Recipe) -> str:
    for run in _newest_first(runs, recipe):
        return run.name
    raise UserError(f"--resume: no run of {recipe.name!r} in {runs.location}")


def _newest_first(runs: Storage, recipe: Recipe) -> Iterator[RunFolder]:
    times = {name: runs.modified(f"{name}/{RUN_FILE}") or 0.0 for name in runs.folders()}
    for name in sorted(times, key=lambda name: times[name], reverse=True):
        folder = read_run(runs.at(name))
        if folder is not None and folder.recipe.get("name") == recipe.name:
            yield folder


def _unused(runs: Storage, name: str) -> str:
    taken = set(runs.folders())
    candidates = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    return next(candidate for candidate in candidates if candidate not in taken)


def _refuse_changes(folder: RunFolder, recipe: Recipe) -> None:
    try:
        before = Recipe.model_validate(folder.recipe)
    except ValidationError as error:
        raise UserError(
            f"run {folder.name} was started by another version of resnet_dist ({explain(error, Recipe)}); "
            "give a new --name"
        ) from None
    # Compare without passwords and signatures: run.json has none, and a URL that is signed anew is the same.
    was, now = _comparable(before), _comparable(recipe)
    changed = [
        f"{key} was {was.get(key)}, is {value}"
        for key, value in now.items()
        if was.get(key) != value and not may_change(key, before, recipe)
    ]
    if changed:
        raise UserError(
            f"run {folder.name} was started with another recipe ({'; '.join(changed)}); "
            f"give a new --name, or the same recipe: a copy of {folder.location}/{RUN_FILE} in place of the recipe file"
        )


def _comparable(recipe: Recipe) -> dict[str, object]:
    """Return the fields of a recipe; a file that came with a job has another place in each job."""
    return {
        key: _SENT_WITH_JOB.sub("", value) if isinstance(value, str) else value
        for key, value in recipe.public().flat().items()
    }


def may_change(key: str, before: Recipe, after: Recipe) -> bool:
    """Report whether a resumed run may have another value of field `key`."""
    if key == "train.length":
        # The steps taken so far must be those that the new length would have taken. They are only where the
        # learning rate and the average do not depend on the steps that remain, and lengths in percent have not moved.
        return before.schedule.decay == after.schedule.decay == "constant" and not after.train.ema_rise
    return key in MAY_CHANGE or key in COMPARED_IN_STEPS
