"""Check a request before a rank starts, first from the recipe alone, then with the data; prepare shards.

Everything that can be refused is refused here, as a UserError of one sentence.
"""

from __future__ import annotations

import os
import posixpath
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from resnet_dist.config import DEFAULT_WORKERS, Recipe, WorkerRange, check_classes, check_world_size
from resnet_dist.config.unread import unread_fields
from resnet_dist.data.findings import one_line
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare_splits
from resnet_dist.data.shards.index import INDEX_NAME, Index, check_shards, read_index
from resnet_dist.data.shards.labels import class_difference
from resnet_dist.data.storage.stored_file import check_command
from resnet_dist.data.storage.urls import is_local, local_path, shown
from resnet_dist.driver.request import Reporter, Request
from resnet_dist.errors import RecipeError, UserError
from resnet_dist.launch.on_ray.settings import ADDRESS_VARIABLE
from resnet_dist.model import Options, check_batch_norm, check_model, has_whitening
from resnet_dist.runs.folder import RunFolder, read_run
from resnet_dist.runs.storage.open import is_url, open_storage
from resnet_dist.train.plan import Plan, moved_lengths, order_of, unreached
from resnet_dist.train.start.init_from import TORCHVISION
from resnet_dist.train.start.initial import check_init_from


def check_request(request: Request) -> None:
    """Raise UserError where flags contradict each other, and RecipeError as `check_recipe` does."""
    check_recipe(request.recipe, request.ranks)
    if request.recipe.train.evaluate == "beside" and (request.local or request.torchrun is not None):
        how = "--local" if request.local else "torchrun"
        raise UserError(
            f"train.evaluate='beside': {how} has no process beside the ranks that could evaluate; use train.evaluate='inline', "
            "or train on Ray"
        )
    if request.torchrun is not None:
        for flag, is_set in (
            ("--local", request.local),
            ("--workers", request.workers is not None),
            ("--address", request.address is not None),
        ):
            if is_set:
                raise UserError(
                    f"{flag}: torchrun has started the ranks already ({request.ranks} of them; its own "
                    f"--nproc-per-node and --nnodes set the number); leave it out"
                )
        return
    if request.local and request.workers is not None and request.workers.max > 1:
        raise UserError(
            f"--workers {request.workers}: --local trains as one rank in this process; leave one of them out"
        )
    if request.local and request.address is not None:
        raise UserError(
            f"--address {request.address}: --local trains in this process, without a cluster; leave one of them out"
        )


def resolve_paths(recipe: Recipe, output: Path | str) -> Recipe:
    """Fill in `{output}` and make paths absolute, because ranks run in other folders; URLs stay unchanged."""

    def absolute(location: str) -> str:
        location = location.replace("{output}", str(output))
        return str(local_path(location).absolute()) if is_local(location) else location

    cache = recipe.data.shard_cache
    data = recipe.data.model_copy(
        update={
            "train": absolute(recipe.data.train),
            "eval": absolute(recipe.data.eval),
            "source": recipe.data.source and os.path.expanduser(recipe.data.source),
            # Keep `~`: every node expands it to its own home folder.
            "shard_cache": cache if cache.startswith("~") else absolute(cache),
        }
    )
    weights = recipe.model.init_from
    if weights is not None and not weights.startswith(TORCHVISION):
        weights = absolute(weights)
    model = recipe.model.model_copy(update={"init_from": weights})
    return recipe.model_copy(update={"data": data, "model": model})


def absolute_paths(recipe: Recipe, sent: Callable[[Path], str | None] = lambda path: None) -> Recipe:
    """Make relative paths absolute, because a submitted job runs in another folder.

    `{output}` and `~` stay: the cluster fills them in. sent: returns the path of what is sent with the job, relative to
    the folder that the job runs in.
    """

    def absolute(location: str | None) -> str | None:
        if location is None or location.startswith(("{output}", "~")) or not is_local(location):
            return location
        path = Path(os.path.abspath(local_path(location)))
        return sent(path) or str(path)

    data, source, weights = recipe.data, recipe.data.source, recipe.model.init_from
    changes = {name: absolute(getattr(data, name)) for name in ("train", "eval", "shard_cache")}
    # A source is a folder only where there is one: most are names of data sets.
    changes["source"] = absolute(source) if source is not None and Path(source).is_dir() else source
    if weights is not None and not weights.startswith(TORCHVISION):
        weights = absolute(weights)
    model = recipe.model.model_copy(update={"init_from": weights})
    return recipe.model_copy(update={"data": data.model_copy(update=changes), "model": model})


def with_workers(request: Request) -> Request:
    """Return the request with a number of ranks under Ray: as many as is the default, or one on a machine with a single GPU."""
    if request.workers is not None or request.local or request.torchrun is not None:
        return request
    here = request.address is None and not os.environ.get(ADDRESS_VARIABLE)
    one_gpu = here and request.gpu is not False and torch.cuda.device_count() == 1
    return replace(
        request, workers=WorkerRange.default(request.recipe, limit=1 if one_gpu else DEFAULT_WORKERS)
    )


def check_recipe(recipe: Recipe, ranks: WorkerRange) -> None:
    """Check, as far as possible without the data, that `recipe` runs on these numbers of ranks.

    Raises RecipeError.
    """
    if not ranks.is_range:
        check_world_size(recipe.data, ranks.max)
    sizes = ranks.sizes(recipe)
    data, fields = recipe.data, recipe.model.options()
    name, options = fields.pop("name"), Options(**fields)
    training_size = data.smallest_training_size
    # With sync_batch_norm all ranks share their statistics; without it each normalises its own samples.
    num_groups = 1 if recipe.train.sync_batch_norm else sizes[0]
    samples = data.micro_batch_size or data.global_batch_size // num_groups
    try:
        check_model(name, options, min(training_size, data.evaluation_size))
        check_batch_norm(name, options, training_size, samples)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    _check_whitening(recipe)


def _check_whitening(recipe: Recipe) -> None:
    """Raise RecipeError for fields of the whitening layer where the network has none."""
    fields = {
        "schedule.whitening_bias": recipe.schedule.whitening_bias,
        "optim.whitening_bias_lr_scale": recipe.optim.whitening_bias_lr_scale,
    }
    for name, value in fields.items():
        if value not in (None, 1.0) and not has_whitening(recipe.model.name):
            raise RecipeError(
                f"{name}={value!r}: {recipe.model.name} has no whitening layer; leave it out, or use "
                "model.name=resnet9_fast"
            )


def check_data(
    recipe: Recipe, reporter: Reporter, *, is_new: bool, output: Path | str = ""
) -> tuple[tuple[Index, Index], int]:
    """Return the indexes of the training and the evaluation set, and the number of steps of the run.

    Prepares missing shards from `data.source`, in a folder or below the URL `output`. is_new: the run has no checkpoint, so its initial weights are
    checked. Raises UserError where shards and indexes do not agree or do not suit the recipe.
    """
    prepare_missing(recipe, reporter, output)
    train_index, eval_index = read_index(recipe.data.train), read_index(recipe.data.eval)
    _check_classes_agree(train_index, eval_index)
    for index in (train_index, eval_index):
        check_shards(index)
        for shard in index.shards:
            check_command(shard.url, allowed=recipe.data.allow_commands)
    check_classes(recipe.train, len(train_index.classes))
    if is_new:
        check_init_from(recipe, len(train_index.classes))
    plan = Plan.of(recipe, order_of(recipe, train_index))
    for line in (*unread_fields(recipe), *unreached(recipe, plan)):
        reporter.note(line)
    return (train_index, eval_index), plan.total


def check_continued(run: RunFolder, recipe: Recipe, train_index: Index) -> None:
    """Raise UserError where a run that exists would do at other steps what it began to do at some.

    Lengths in percent of train.length move with it.
    """
    started = read_run(run.storage)
    if started is None:
        return
    before, order = Recipe.model_validate(started.recipe), order_of(recipe, train_index)
    moved = moved_lengths(Plan.of(before, order), Plan.of(recipe, order))
    if moved and before.train.length == recipe.train.length:
        raise UserError(
            f"run {run.name} was started with another recipe ({'; '.join(moved)}); give a new --name, or the same recipe"
        )
    if moved:
        raise UserError(
            f"run {run.name} would not continue what it began: train.length was {before.train.length}, is "
            f"{recipe.train.length}, which moves {' and '.join(moved)}; give those lengths in steps, as they were, "
            "or give a new --name"
        )


def _check_classes_agree(train: Index, evaluation: Index) -> None:
    """Raise UserError where the indexes of the two sets name different classes, with the command that mends it."""
    difference = class_difference(train.classes, evaluation.classes)
    if difference is None:
        return
    shorter, longer = sorted((train, evaluation), key=lambda index: len(index.classes))
    changed = shlex.quote(shown(shorter.location))
    command = f"`resnet-dist index {changed} --out {changed} --classes {shlex.quote(shown(longer.location))}`"
    if shorter.classes == longer.classes[: len(shorter.classes)]:
        advice = f"{command} gives both the same classes"
    else:
        advice = (
            f"where equal labels mean the same class, {command} names them alike; otherwise prepare both sets from one "
            "folder"
        )
    raise UserError(
        f"{shown(train.location)} and {shown(evaluation.location)} name different classes: {difference}; {advice}"
    )


def prepare_missing(recipe: Recipe, reporter: Reporter, output: Path | str) -> None:
    """Prepare the recipe's shards from `data.source` where a folder, or a place below the URL `output`, has no index.

    Raises RecipeError.
    """
    train, evaluation, source_name = recipe.data.train, recipe.data.eval, recipe.data.source
    places = [place for place in (train, evaluation) if _is_writable(place, output)]
    missing = [p for p in places if not p.endswith(".json") and open_storage(p).read(INDEX_NAME) is None]
    if source_name is None or not missing:
        return
    target = posixpath.dirname(train)
    if (train, evaluation) != (f"{target}/train", f"{target}/eval"):
        raise RecipeError(
            f"data.source={source_name!r} writes folders train and eval side by side, but data.train={train} and "
            f"data.eval={evaluation}"
        )
    with open_storage(target).bundles(INDEX_NAME).fill() as folder:
        source = open_source(source_name, output=folder)
        reporter.note(f"preparing {source.name} in {shown(target)}")
        for split, prepared in prepare_splits(source, folder).items():
            if prepared.findings.left_out:
                count, report = prepared.findings.num_left_out, one_line(str(prepared.report))
                reporter.note(f"{split}: {count:,} files of the source are left out, listed in {report}")


def _is_writable(place: str, output: Path | str) -> bool:
    """Report whether shards may be prepared there: in any folder, but of all buckets only in that of the output."""
    return is_local(place) or (is_url(output) and place.startswith(f"{output}/"))
