"""Fork a run: begin a new one with the checkpoint of another, at its step.

A fork continues what the checkpoint holds: weights, their average, the optimizer's moments, the loss scale, and the
position in the data. So step N + 1 of the fork trains on the samples of step N + 1 of the other run, and the curves lie on
one axis. What decides which samples these are, and what the tensors are of, must be the same; everything else may change,
such as the learning rate, the schedule, the loss, the augmentations or the length. To begin at step 0 with the weights
alone there is `model.init_from`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from resnet_dist.config import Recipe
from resnet_dist.config.part import explain
from resnet_dist.data.shards.index import Index
from resnet_dist.driver.request import Request
from resnet_dist.errors import RecipeError, UserError
from resnet_dist.runs.evaluation_results import AWAITS
from resnet_dist.runs.folder import RunFolder, checkpoint_name
from resnet_dist.runs.lineage import Lineage
from resnet_dist.system.files import expanded
from resnet_dist.tracking.locate import locate_run
from resnet_dist.train.checkpoint.folder import (
    MANIFEST,
    DamagedCheckpoint,
    VerifiedCheckpoint,
    fetch_checkpoint,
    list_checkpoints,
    remove,
    remove_unfinished,
    step_of,
    write_checkpoint,
)

# The fields that the tensors of a checkpoint and the position in the data depend on.
FIXED = (
    "seed",
    "data.global_batch_size",
    "data.lanes",
    "data.window",
    "data.repeats",
    "data.channels",
    "optim.optimizer",
)
# Of the model, all but the weights of step 0, which a fork does not read.
FREE_OF_MODEL = ("model.init_from",)
# They sort parameters into groups; the state of some optimizers belongs to a group.
GROUPING = ("optim.bias_lr_scale", "optim.decay_norms", "optim.decay_biases", "optim.decay_shortcut_norms")
GROUP_PREFIX = "groups."


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a fork begins with, and the run that has it."""

    run: RunFolder
    checkpoint: str  # its name

    @property
    def step(self) -> int:
        return step_of(self.checkpoint)

    @property
    def lineage(self) -> Lineage:
        return Lineage(self.run.name, self.step, self.run.location, self.run.run_id)


def find_origin(request: Request, run: RunFolder) -> Origin | None:
    """Return the checkpoint that `--from RUN[@STEP]` names; None without the flag, and where `run` has begun with it.

    Raises UserError where there is none, or where `run` has begun otherwise.
    """
    if request.begin_from is None:
        return None
    flag = f"--from {request.begin_from}"
    name, at, step = request.begin_from.rpartition("@")
    if not at or "/" in step:  # The sign belongs to a path.
        name, at, step = request.begin_from, "", ""
    if not name or (at and not step.isdecimal()):
        raise UserError(f"{flag}: give a run, or RUN@STEP with the step of a checkpoint")
    if run.attempt > 1:
        _check_begun(run, name, int(step) if step else None)
        return None
    found = locate_run(name, request.output, flag)
    known = list_checkpoints(found.checkpoints)
    if not known:
        raise UserError(f"{flag}: {found.location} has no checkpoint yet")
    wanted = checkpoint_name(int(step)) if step else known[-1]
    if wanted not in known:
        steps = ", ".join(str(step_of(one)) for one in known)
        raise UserError(f"{flag}: {found.location} keeps the checkpoints of steps {steps}")
    return Origin(found, wanted)


def check_fork(origin: Origin, recipe: Recipe, indexes: Sequence[Index], total_steps: int) -> None:
    """Raise UserError where the recipe cannot take the checkpoint, with the fields that differ."""
    of_origin, location = f"run {origin.run.name}", origin.run.location
    try:
        before = Recipe.model_validate(origin.run.recipe)
    except ValidationError as error:
        raise UserError(f"{of_origin} was started by another version ({explain(error, Recipe)})") from None
    if changed := _changes(before, recipe, _has_group_state(origin)):
        raise RecipeError(
            f"a checkpoint of {of_origin} does not fit this recipe: {'; '.join(changed)}; set the same, or begin at step 0 "
            f"with its weights alone: --set model.init_from={location}"
        )
    if origin.run.data and origin.run.data[0] != indexes[0].digest():
        raise UserError(
            f"{of_origin} was trained on other shards than data.train={recipe.data.train} holds, so step {origin.step} is "
            f"no position in them; give the same, or --set model.init_from={location}"
        )
    if total_steps <= origin.step:
        raise RecipeError(
            f"train.length={recipe.train.length!r} is {total_steps} steps, and the checkpoint of {of_origin} has taken "
            f"{origin.step}; give a longer one"
        )


def begin_fork(origin: Origin, run: RunFolder, recipe: Recipe, report: Callable[[str], None]) -> RunFolder:
    """Return a new run as the fork of `origin`, with a copy of its checkpoint. Raises UserError.

    The copy makes the fork independent: the other run may go on, be removed, or lie in a place that ranks do not see.
    """
    if run.attempt > 1:  # Another process has begun a run of that name meanwhile.
        raise UserError(f"run {run.name} has begun meanwhile; give a new --name")
    try:
        found = fetch_checkpoint(origin.run.checkpoints, origin.checkpoint)
    except DamagedCheckpoint as problem:
        raise UserError(f"--from {origin.run.name}@{origin.step}: {problem}") from None
    remove_unfinished(run.checkpoints)
    # Of a fork that was killed before it was recorded, perhaps at another step.
    remove(run.checkpoints, list_checkpoints(run.checkpoints))
    write_checkpoint(run.checkpoints, origin.step, found.tensors, _manifest(found, recipe))
    report(f"run {run.name} begins with step {origin.step} of run {origin.run.name}")
    fork = replace(run, lineage=origin.lineage, order=origin.run.order)
    fork.write()  # At once: a checkpoint alone would look like that of a run without an origin.
    return fork


def _check_begun(run: RunFolder, name: str, step: int | None) -> None:
    """Raise UserError unless a run that exists was forked from the run that a person names."""
    lineage = run.lineage
    if lineage is not None and step in (None, lineage.step):
        path = str(expanded(name).absolute())
        if name in (lineage.run, lineage.location) or path == lineage.location:
            return
        if lineage.run_id is not None and lineage.run_id.startswith(name):
            return
    begun = f"with {lineage}" if lineage else "at step 0"
    raise UserError(f"run {run.name} exists, and began {begun}; give a new --name, or leave --from out")


def _manifest(found: VerifiedCheckpoint, recipe: Recipe) -> dict[str, object]:
    """Return the manifest of the copy: with the recipe of the fork, and without a best step that it does not have."""
    scalars = dict(found.manifest["scalars"])
    scalars.pop(AWAITS, None)  # The other run evaluates it.
    best = scalars.get("best")
    if best and best["step"] != scalars["step"]:
        scalars["best"] = None
    return {
        "scalars": scalars,
        "recipe": recipe.public().model_dump(mode="json"),
        "classes": found.manifest["classes"],
    }


def _changes(before: Recipe, after: Recipe, has_group_state: bool) -> list[str]:
    """Return the fields that must be the same and are not, with both values."""
    was, now = before.public().flat(), after.public().flat()
    model = [key for key in now if key.startswith("model.") and key not in FREE_OF_MODEL]
    fixed = [*FIXED, *model, *(GROUPING if has_group_state else ())]
    return [f"{key} was {was.get(key)}, is {now[key]}" for key in fixed if was.get(key) != now[key]]


def _has_group_state(origin: Origin) -> bool:
    """Report whether the optimizer of a checkpoint keeps something for a whole group of parameters, as LAMB does."""
    content = origin.run.checkpoints.read(f"{origin.checkpoint}/{MANIFEST}") or b""
    try:
        scalars = json.loads(content)["scalars"]
    except (ValueError, KeyError, TypeError):  # damaged: reported when it is copied
        return False
    return any(key.startswith(GROUP_PREFIX) for key in scalars.get("optimizer", {}))
