"""The driver: from a recipe to a finished run. It prepares, starts the ranks, follows them, and closes the run.

Everything that can be refused is refused before Ray starts or a file is written.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from resnet_dist.attempt import Attempt, run_attempt
from resnet_dist.config import Recipe, RecipeError, UserError, check_classes, check_world_size
from resnet_dist.cpus import cpu_count
from resnet_dist.data.index import INDEX_NAME, Index, check_shards, read_index
from resnet_dist.data.prepare import prepare
from resnet_dist.data.remote import is_local
from resnet_dist.data.sources import open_source
from resnet_dist.data.storage import check_command
from resnet_dist.interrupts import StopRequest, interrupt, interrupt_second, signals_call, signals_held
from resnet_dist.launcher import DEFAULT_WORKERS
from resnet_dist.model import Options, check_batch_norm, check_model
from resnet_dist.runs import RunFolder, Status, choose_run, run_of_launch
from resnet_dist.torchrun import Ranks as TorchrunRanks
from resnet_dist.tracking.spool import Entry
from resnet_dist.train.checkpoint import best_checkpoint, list_checkpoints
from resnet_dist.train.initial import check_init_from
from resnet_dist.train.loop import Outcome
from resnet_dist.train.plan import plan_of
from resnet_dist.train.weights import TORCHVISION
from resnet_dist.world import World

log = logging.getLogger(__name__)

LAST_UPLOAD_SECONDS = CLOSE_SECONDS = 30.0
# Beside the ranks' grace time little is left: what is not sent is in the spool, and a continued run sends it.
LAST_UPLOAD_INTERRUPTED_SECONDS = CLOSE_INTERRUPTED_SECONDS = 3.0
LONG_START_SECONDS = 60.0  # after which ranks that do not begin are worth a word


@dataclass(frozen=True)
class Request:
    """What a person asked for."""

    recipe: Recipe
    source: str  # the recipe file
    output: Path
    workers: int | None = None  # under Ray; 2
    gpu: bool | None = None  # None: where there are any
    local: bool = False
    address: str | None = None
    name: str | None = None
    resume: bool = False
    torchrun: TorchrunRanks | None = None  # whose rank 0 this process is

    @property
    def world_size(self) -> int:
        if self.torchrun is not None:
            return int(self.torchrun.world_size)
        return 1 if self.local else self.workers or DEFAULT_WORKERS


@dataclass(frozen=True)
class Summary:
    run: RunFolder
    outcome: Outcome
    checkpoint: Path | None
    seconds: float
    unsent_metrics: int


class Interrupted(Exception):
    """A person or the cluster stopped the run; `run` resumes from its newest checkpoint."""

    exit_code = 130

    def __init__(self, run: RunFolder, step: int | None) -> None:
        super().__init__(f"run {run.name} was interrupted")
        self.run, self.step = run, step


class Reporter(Protocol):
    """What the person sees while the driver works."""

    def say(self, text: str) -> None: ...

    def begin(self, total_steps: int) -> None: ...

    def entry(self, entry: Entry) -> None: ...


class Tracking(Protocol):
    """The driver's side of an experiment tracker: MLflow, or the spool alone where it is not installed."""

    @property
    def run_id(self) -> str | None: ...

    def start(self) -> None: ...

    def finish(self, timeout_seconds: float) -> int: ...

    def log_results(self, checkpoint: Path | None) -> None: ...

    def close(self, status: Status, timeout_seconds: float) -> None: ...


OpenTracking = Callable[[Request, RunFolder, Callable[[Entry], None]], Tracking]


def run_training(request: Request, reporter: Reporter, open_tracking: OpenTracking) -> Summary:
    """Train `request.recipe` to its end.

    Raises UserError before anything is started; Interrupted after SIGINT or SIGTERM (KeyboardInterrupt before
    there is a run); TrainingError or RankFailed where the training failed. The MLflow run is closed on every
    way out.
    """
    start = time.monotonic()
    request = replace(request, recipe=resolve_paths(request.recipe, request.output))
    check_request(request)
    with signals_call(interrupt), ExitStack() as stack:
        run = _choose_run(request)
        indexes, total_steps = check_data(
            request.recipe, reporter, is_new=not list_checkpoints(run.checkpoints)
        )
        run = stack.enter_context(locked(request, run))  # until its ranks are gone
        run = run.with_data([index.digest() for index in indexes])
        ranks = stack.enter_context(_ranks(request, reporter))
        tracking: Tracking | None = None
        status: Status = "FAILED"
        outcome, unsent = None, 0
        try:
            with signals_held():  # a run that was begun in MLflow must be closed
                tracking = _open(request, run, reporter, open_tracking)
            run = run.with_run_id(tracking.run_id)
            run.write()
            tracking.start()
            reporter.say(f"run {run.name}: {total_steps} steps, {request.world_size} rank(s)")
            reporter.begin(total_steps)
            outcome = ranks(run)
            status = "FINISHED" if outcome is not None and outcome.finished else "KILLED"
        except KeyboardInterrupt:
            status = "KILLED"
        finally:
            if tracking is not None:
                status, unsent = _close(tracking, run, status)
    if outcome is None or status == "KILLED":
        raise Interrupted(run, outcome.step if outcome else None)
    return Summary(run, outcome, _newest(run), time.monotonic() - start, unsent)


def check_request(request: Request) -> None:
    """What needs no data to be refused. Raises UserError."""
    check_recipe(request.recipe, request.world_size)
    if request.torchrun is not None:
        for flag, given in (
            ("--local", request.local),
            ("--workers", request.workers is not None),
            ("--address", request.address is not None),
        ):
            if given:
                raise UserError(
                    f"{flag}: torchrun has started the ranks already ({request.world_size} of them; its own "
                    f"--nproc-per-node and --nnodes say how many); leave it out"
                )
        return
    if request.local and (request.workers or 1) > 1:
        raise UserError(
            f"--workers {request.workers}: --local trains as one rank in this process; leave one of them out"
        )
    if request.local and request.address is not None:
        raise UserError(
            f"--address {request.address}: --local trains in this process, without a cluster; leave one of them out"
        )


def _choose_run(request: Request) -> RunFolder:
    ranks, name = request.torchrun, request.name
    if name is None and ranks is not None and ranks.restarted:  # --max-restarts starts the same command again
        name = run_of_launch(request.output, request.recipe, ranks.launch)
    run = choose_run(request.output, request.recipe, name, resume=request.resume)
    return replace(run, launch=ranks.launch if ranks is not None else "")


@contextmanager
def locked(request: Request, run: RunFolder) -> Iterator[RunFolder]:
    """`run` as it is under its lock: since it was chosen, another process may have begun or ended an attempt."""
    named_by_us = run.attempt == 1 and run.name != request.name
    while True:
        with ExitStack() as stack:
            try:
                stack.enter_context(run.lock())
            except UserError:
                if not named_by_us:
                    raise
            else:
                again = _choose_run(replace(request, name=run.name, resume=False))
                if again.attempt == run.attempt or not named_by_us:
                    yield again
                    return
        run = _choose_run(request)  # another that began in the same second has the name


def _open(request: Request, run: RunFolder, reporter: Reporter, open_tracking: OpenTracking) -> Tracking:
    """The tracker of a run whose folder is there first: a driver that dies between the two leaves no orphan."""
    run.write()
    try:
        return open_tracking(request, run, reporter.entry)
    except UserError:
        if run.attempt == 1:
            run.remove()
        raise


def _close(tracking: Tracking, run: RunFolder, status: Status) -> tuple[Status, int]:
    """Send what is left, log the model of a run that finished, close the run: its status, metrics not sent."""
    unsent = 0
    try:
        if status == "KILLED":
            unsent = tracking.finish(LAST_UPLOAD_INTERRUPTED_SECONDS)
        else:
            unsent = tracking.finish(LAST_UPLOAD_SECONDS)
            # Where a recipe names a metric to choose by, its best model is what one wants to load.
            model = best_checkpoint(run.checkpoints) or _newest(run)
            tracking.log_results(model if status == "FINISHED" else None)
    except KeyboardInterrupt:
        if status == "FINISHED":
            status = "KILLED"  # all is trained; continuing the run does the rest
    finally:
        try:
            with signals_call(interrupt_second):
                tracking.close(status, CLOSE_INTERRUPTED_SECONDS if status == "KILLED" else CLOSE_SECONDS)
        except KeyboardInterrupt:
            status = "KILLED"
    return status, unsent


def _newest(run: RunFolder) -> Path | None:
    return next(reversed(list_checkpoints(run.checkpoints)), None)


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
    check_world_size(recipe.data, world_size)
    data, fields = recipe.data, recipe.model.options()
    name, options = fields.pop("name"), Options(**fields)
    training_size = data.smallest_training_size
    all_ranks = recipe.train.sync_batch_norm
    samples = data.micro_batch_size or data.global_batch_size // (1 if all_ranks else world_size)
    try:
        check_model(name, options, min(training_size, data.evaluation_size))
        check_batch_norm(name, options, training_size, samples)
    except ValueError as error:
        raise RecipeError(str(error)) from None


def check_data(recipe: Recipe, reporter: Reporter, *, is_new: bool) -> tuple[tuple[Index, Index], int]:
    """The indexes of both sets, and the steps of the run.

    Prepares what is missing and can be made; raises UserError where shards and indexes do not agree.
    """
    prepare_missing(recipe, reporter)
    train_index, eval_index = read_index(recipe.data.train), read_index(recipe.data.eval)
    if train_index.classes != eval_index.classes:
        raise UserError(f"{train_index.location} and {eval_index.location} name different classes")
    for index in (train_index, eval_index):
        check_shards(index)
        for shard in index.shards:
            check_command(shard.url, allowed=recipe.data.allow_commands)
    check_classes(recipe.train, len(train_index.classes))
    if is_new:
        check_init_from(recipe, len(train_index.classes))
    plan = plan_of(recipe, train_index)[1]
    if plan.warmup > plan.total:
        reporter.say(
            f"schedule.warmup={recipe.schedule.warmup!r} is longer than train.length={recipe.train.length!r}: the rate "
            "does not reach optim.lr"
        )
    return (train_index, eval_index), plan.total


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
    if request.torchrun is not None:
        return nullcontext(_torchrun_ranks(request, request.torchrun))
    if request.local:
        return nullcontext(_local_ranks(request))
    return _RayRanks(request, reporter)


def _local_ranks(request: Request) -> Ranks:
    gpu = torch.cuda.is_available() if request.gpu is None else request.gpu
    if gpu and not torch.cuda.is_available():
        raise UserError("--gpu: this machine has no CUDA device that torch can use; use --cpu")

    def run(folder: RunFolder) -> Outcome | None:
        attempt, stop = _attempt(request, folder, threads=cpu_count()), StopRequest()
        with signals_call(stop.ask):
            return run_attempt(attempt, World.single(gpu=gpu), stop.asked, stop.over)

    return run


def _torchrun_ranks(request: Request, ranks: TorchrunRanks) -> Ranks:
    gpu = ranks.check(gpu=request.gpu)

    def run(folder: RunFolder) -> Outcome | None:
        threads = max(1, cpu_count() // ranks.local_world_size)
        attempt = _attempt(request, folder, threads=threads)
        ranks.tell(attempt, gpu=gpu)
        return ranks.run(attempt, gpu=gpu)

    return run


class _RayRanks:
    """A Ray cluster for as long as the context lasts."""

    def __init__(self, request: Request, reporter: Reporter) -> None:
        self._request, self._reporter = request, reporter
        self._stack = ExitStack()

    def __enter__(self) -> Ranks:
        try:
            with signals_held():  # an exception in the middle of Ray's import leaves wreckage
                from resnet_dist import launch
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "ray":  # an installation that is broken
                raise
            raise UserError(f"Ray is not installed ({error}); --local trains in this process") from None
        request, workers = self._request, self._request.world_size
        if not (request.address or os.environ.get("RAY_ADDRESS")):
            self._reporter.say("starting Ray on this machine")
            if request.gpu and torch.cuda.device_count() < workers:
                raise UserError(
                    f"--gpu --workers {workers}: this machine has {torch.cuda.device_count()} CUDA "
                    "device(s); use fewer workers, --cpu, or --address of a cluster"
                )
            if request.workers is None and request.gpu is None and torch.cuda.device_count() == 1:
                workers = 1  # nobody asked for two
        self._stack.enter_context(launch.cluster(request.address, workers=workers))
        with self._stack:  # an error below ends the cluster too
            nodes = launch.nodes()
            gpu = sum(node.gpus for node in nodes) > 0 if request.gpu is None else request.gpu
            threads = launch.cpus_per_rank(nodes, workers, gpu=gpu)
            self._stack = self._stack.pop_all()

        def run(folder: RunFolder) -> Outcome | None:
            stop, size_before = StopRequest(), folder.spool_size()
            late = time.monotonic() + LONG_START_SECONDS

            def have_begun() -> bool:
                return folder.spool_size() > size_before

            def ask(count: int) -> None:
                stop.ask(count)
                folder.stop_file.touch()  # the ranks see it wherever they are
                if not have_begun():
                    stop.give_up()  # nothing could be saved

            def give_up() -> bool:
                nonlocal late
                if time.monotonic() > late:
                    late = math.inf  # once
                    if not have_begun():
                        need = f"{threads} CPU(s){' and a GPU' if gpu else ''}"
                        self._reporter.say(
                            f"no rank has begun after {LONG_START_SECONDS:g} s: {workers} wait for {need} each; "
                            f"{launch.free_resources()} are free in the cluster"
                        )
                return stop.over()

            with signals_call(ask):
                return launch.train_on_ray(
                    _attempt(request, folder, threads=threads),
                    folder.path,
                    workers=workers,
                    gpu=gpu,
                    give_up=give_up,
                )

        return run

    def __exit__(self, *details: object) -> None:
        # A second Ctrl-C cuts the wait for Ray's end short, and what is known of the run stays what it is.
        with suppress(KeyboardInterrupt), signals_call(interrupt_second):
            self._stack.close()


def _attempt(request: Request, folder: RunFolder, *, threads: int) -> Attempt:
    return Attempt(request.recipe.to_json(), str(folder.path.absolute()), threads)
