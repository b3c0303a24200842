"""The driver: from a recipe to a finished run. It prepares, starts the ranks, follows them, and closes the run.

Everything that can be refused is refused before Ray starts or a file is written.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from resnet_dist.attempt import Attempt, run_attempt, signals_call
from resnet_dist.config import Recipe, RecipeError, UserError, check_world_size
from resnet_dist.data.index import INDEX_NAME, check_shards, read_index
from resnet_dist.data.prepare import prepare
from resnet_dist.data.remote import is_local
from resnet_dist.data.sources import open_source
from resnet_dist.data.storage import check_command
from resnet_dist.model import Options, check_model
from resnet_dist.runs import RunFolder, choose_run
from resnet_dist.tracking.spool import Entry
from resnet_dist.train.checkpoint import list_checkpoints
from resnet_dist.train.initial import check_init_from
from resnet_dist.train.loop import Outcome
from resnet_dist.train.plan import Plan, plan_of
from resnet_dist.train.weights import TORCHVISION
from resnet_dist.world import World

log = logging.getLogger(__name__)

STOP_GRACE_SECONDS = 25.0  # for the step under way and its checkpoint; Ray Jobs and Kubernetes allow 30
LAST_UPLOAD_SECONDS = 30.0


@dataclass(frozen=True)
class Request:
    """What a person asked for."""

    recipe: Recipe
    source: str  # the recipe file
    output: Path
    workers: int = 2
    gpu: bool | None = None  # None: where there are any
    local: bool = False
    address: str | None = None
    name: str | None = None
    resume: bool = False


@dataclass(frozen=True)
class Summary:
    run: RunFolder
    outcome: Outcome
    checkpoint: Path | None
    seconds: float
    unsent_metrics: int


class Interrupted(Exception):
    """A person or the cluster stopped the run; `run` resumes from its newest checkpoint."""

    def __init__(self, run: RunFolder, step: int | None) -> None:
        super().__init__(f"run {run.name} was interrupted")
        self.run, self.step = run, step


class Reporter(Protocol):
    """What the person sees while the driver works."""

    def say(self, text: str) -> None: ...

    def begin(self, total_steps: int) -> None: ...

    def entry(self, entry: Entry) -> None: ...


class Tracking(Protocol):
    """The driver's side of an experiment tracker; None in its place where none is installed."""

    @property
    def run_id(self) -> str: ...

    def start(self) -> None: ...

    def finish(self, timeout_seconds: float) -> int: ...

    def log_model(self, checkpoint: Path, step: int) -> None: ...

    def close(self, status: str) -> None: ...


OpenTracking = Callable[[Request, RunFolder, Callable[[Entry], None]], Tracking]


def run_training(request: Request, reporter: Reporter, open_tracking: OpenTracking) -> Summary:
    """Train `request.recipe` to its end.

    Raises UserError before anything is started; Interrupted after SIGINT or SIGTERM; TrainingError or
    RankFailed where the training failed. The MLflow run is closed on every way out.
    """
    start = time.monotonic()
    request = replace(request, recipe=resolve_paths(request.recipe, request.output))
    world_size = 1 if request.local else request.workers
    check_recipe(request.recipe, world_size)
    run = choose_run(request.output, request.recipe, request.name, resume=request.resume)
    plan = check_data(request.recipe, reporter, is_new=not list_checkpoints(run.checkpoints))

    with ExitStack() as stack:
        ranks = stack.enter_context(_ranks(request, reporter))
        tracking = open_tracking(request, run, reporter.entry)
        run = run.with_run_id(tracking.run_id)
        status = "FAILED"
        try:
            run.write()
            tracking.start()
            reporter.say(f"run {run.name}: {plan.total} steps, {world_size} rank(s)")
            reporter.begin(plan.total)
            outcome = ranks(run)
            status = "FINISHED" if outcome is not None and outcome.finished else "KILLED"
        finally:
            unsent = tracking.finish(LAST_UPLOAD_SECONDS)
            newest = next(reversed(list_checkpoints(run.checkpoints)), None)
            if status == "FINISHED" and newest is not None and outcome is not None:
                tracking.log_model(newest, outcome.step)
            tracking.close(status)
    if outcome is None or not outcome.finished:
        raise Interrupted(run, outcome.step if outcome else None)
    return Summary(run, outcome, newest, time.monotonic() - start, unsent)


def resolve_paths(recipe: Recipe, output: Path) -> Recipe:
    """`{output}` filled in, and paths absolute: ranks do not run in this folder. URLs stay as they are."""

    def absolute(location: str) -> str:
        location = location.replace("{output}", str(output))
        return str(Path(location).expanduser().absolute()) if is_local(location) else location

    cache = recipe.data.shard_cache
    data = recipe.data.model_copy(
        update={
            "train": absolute(recipe.data.train),
            "eval": absolute(recipe.data.eval),
            # A home folder is each node's own: it is found there.
            "shard_cache": cache if cache.startswith("~") else absolute(cache),
        }
    )
    weights = recipe.model.init_from
    if weights is not None and not weights.startswith(TORCHVISION):
        weights = absolute(weights)
    model = recipe.model.model_copy(update={"init_from": weights})
    return recipe.model_copy(update={"data": data, "model": model})


def check_recipe(recipe: Recipe, world_size: int) -> None:
    """What needs no data to be refused. Raises RecipeError."""
    options = recipe.model.options()
    try:
        check_model(options.pop("name"), Options(**options), recipe.data.image_size)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    check_world_size(recipe.data, world_size)


def check_data(recipe: Recipe, reporter: Reporter, *, is_new: bool) -> Plan:
    """Prepare what is missing and can be made, compare shards and indexes, and resolve lengths to steps."""
    prepare_missing(recipe, reporter)
    train_index, eval_index = read_index(recipe.data.train), read_index(recipe.data.eval)
    if train_index.classes != eval_index.classes:
        raise UserError(f"{train_index.location} and {eval_index.location} name different classes")
    for index in (train_index, eval_index):
        check_shards(index)
        for shard in index.shards:
            check_command(shard.url, allowed=recipe.data.allow_commands)
    if is_new:
        check_init_from(recipe, len(train_index.classes))
    return plan_of(recipe, train_index)[1]


def prepare_missing(recipe: Recipe, reporter: Reporter) -> None:
    """Make the recipe's shards from `data.source` where they are not there."""
    train, evaluation, source_name = recipe.data.train, recipe.data.eval, recipe.data.source
    folders = [Path(location) for location in (train, evaluation) if is_local(location)]
    missing = [f for f in folders if f.suffix != ".json" and not (f / INDEX_NAME).exists()]
    if source_name is None or not missing:
        return
    target = Path(train).parent
    if (Path(train), Path(evaluation)) != (target / "train", target / "eval"):
        raise RecipeError(
            f"data.source={source_name!r} writes folders train and eval side by side, but data.train={train} and "
            f"data.eval={evaluation}"
        )
    source = open_source(source_name)
    reporter.say(f"preparing {source.name} in {target}")
    prepare(source, target)


Ranks = Callable[[RunFolder], Outcome | None]


def _ranks(request: Request, reporter: Reporter) -> AbstractContextManager[Ranks]:
    """How to run the ranks, once what they need has been found."""
    if request.local:
        return nullcontext(_local_ranks(request))
    return _RayRanks(request, reporter)


def _local_ranks(request: Request) -> Ranks:
    gpu = torch.cuda.is_available() if request.gpu is None else request.gpu
    if gpu and not torch.cuda.is_available():
        raise UserError("--gpu: this machine has no CUDA device that torch can use; use --cpu")

    def run(folder: RunFolder) -> Outcome | None:
        attempt = _attempt(request, folder, threads=len(os.sched_getaffinity(0)))

        def ask(count: int) -> None:
            folder.stop_file.touch()  # the loop finishes its step and writes a checkpoint
            if count > 1:
                raise KeyboardInterrupt

        try:
            with signals_call(ask):
                return run_attempt(attempt, World.single(gpu=gpu))
        except KeyboardInterrupt:
            return None

    return run


class _RayRanks:
    """A Ray cluster for as long as the context lasts."""

    def __init__(self, request: Request, reporter: Reporter) -> None:
        self._request, self._reporter = request, reporter
        self._stack = ExitStack()

    def __enter__(self) -> Ranks:
        try:
            from resnet_dist import launch
        except ImportError as error:
            raise UserError(f"Ray is not installed ({error}); --local trains in this process") from None
        request = self._request
        if not (request.address or os.environ.get("RAY_ADDRESS")):
            self._reporter.say("starting Ray on this machine")
            if request.gpu and torch.cuda.device_count() < request.workers:
                raise UserError(
                    f"--gpu --workers {request.workers}: this machine has {torch.cuda.device_count()} CUDA "
                    "device(s); use fewer workers, --cpu, or --address of a cluster"
                )
        self._stack.enter_context(launch.cluster(request.address, workers=request.workers))
        with self._stack:  # an error below ends the cluster too
            nodes = launch.nodes()
            gpu = sum(node.gpus for node in nodes) > 0 if request.gpu is None else request.gpu
            threads = launch.cpus_per_rank(nodes, request.workers, gpu=gpu)
            self._stack = self._stack.pop_all()

        def run(folder: RunFolder) -> Outcome | None:
            abort = threading.Event()
            with signals_call(lambda count: _ask_ranks(folder, count, abort)):
                return launch.train_on_ray(
                    _attempt(request, folder, threads=threads),
                    folder.path,
                    workers=request.workers,
                    gpu=gpu,
                    abort=abort,
                )

        return run

    def __exit__(self, *details: object) -> None:
        self._stack.close()


def _ask_ranks(folder: RunFolder, count: int, abort: threading.Event) -> None:
    """First signal: ask for a checkpoint, and abort after the grace time. Second: abort now."""
    if count > 1 or not folder.spool.exists():
        abort.set()  # nothing has begun that could be saved
        return
    folder.stop_file.touch()
    timer = threading.Timer(STOP_GRACE_SECONDS, abort.set)
    timer.daemon = True
    timer.start()


def _attempt(request: Request, folder: RunFolder, *, threads: int) -> Attempt:
    return Attempt(request.recipe.to_json(), str(folder.path.absolute()), threads)
