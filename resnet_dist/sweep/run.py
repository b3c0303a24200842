"""Run the trials of a sweep that have no result yet, several at the same time, and report on all of them.

The trials are drawn once. Those with a result are not repeated and interrupted ones are resumed, so the same command
continues a sweep. Every trial is the run that `train` would make of its recipe.

output/sweeps/NAME/   parent.json  sweep.json  figure.png  runs.csv        output/runs/NAME-001/…
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from resnet_dist.config import Recipe, WorkerRange
from resnet_dist.data.shards.index import read_index
from resnet_dist.driver.output import check_output
from resnet_dist.driver.preflight import prepare_missing
from resnet_dist.driver.request import Reporter
from resnet_dist.driver.trial import check_trial
from resnet_dist.errors import INTERRUPTED_EXIT_CODE, RecipeError, UserError
from resnet_dist.launch.ray_cluster.check import find_cluster
from resnet_dist.runs.folder import RUNS_FOLDER, RunFolder, Status, read_run
from resnet_dist.runs.group_folder import STOP_FILE, SWEEP_FILE, held, unsent_line
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.sweep.plan import Outcome, Plan, PlannedTrial, plan_without_trials, planned, read_plan
from resnet_dist.sweep.report import SweepSummary, conclude, report
from resnet_dist.sweep.request import SweepRequest
from resnet_dist.sweep.search import check_value
from resnet_dist.sweep.trial import Report, evaluation, is_finite
from resnet_dist.sweep.watch import Watch
from resnet_dist.system.command import shown
from resnet_dist.system.signals import defer_signals, handle_signals, raise_interrupt
from resnet_dist.tracking.protocol import GroupPublisher, GroupRecord, OpenGroup
from resnet_dist.tracking.spool import Follower
from resnet_dist.train.plan import Plan as TrainPlan
from resnet_dist.train.plan import order_of

if TYPE_CHECKING:
    from resnet_dist.sweep.room import Room


class SweepInterrupted(Exception):
    """A person or the cluster stopped the sweep; the same command continues it."""

    exit_code = INTERRUPTED_EXIT_CODE

    def __init__(self, plan: Plan) -> None:
        super().__init__("the sweep was interrupted")
        self.num_results = sum(trial.has_result for trial in plan.trials)
        self.num_trials = len(plan.trials)


def run_sweep(request: SweepRequest, reporter: Reporter, open_group: OpenGroup) -> SweepSummary:
    """Run the trials of a sweep that have no result yet, then draw its figure and write its table.

    Raises UserError before anything is started, SweepInterrupted after SIGINT or SIGTERM, and RankFailed where the
    trials could not be run. A trial that fails is counted and named. What has ended by then is drawn on every way out.
    """
    check_output(request.output)
    check_plan(request, find_plan(request))
    _check_gpus(request)
    is_new = not request.folder.exists()
    with held(request.folder):
        try:
            return _Sweep(request, find_plan(request), reporter).run(open_group)
        finally:
            # It has not begun. Only while the lock is held: the folder may be that of another command.
            if is_new and not (request.folder / SWEEP_FILE).exists():
                shutil.rmtree(request.folder, ignore_errors=True)


def _check_gpus(request: SweepRequest) -> None:
    """Raise UserError where this machine, as a cluster of its own, has too few GPUs."""
    num, here = request.workers * (request.concurrent or 1), torch.cuda.device_count()
    if request.gpu and find_cluster(request.address) is None and here < num:
        raise UserError(
            f"--gpu: {request.concurrent or 1} trial(s) at a time with {request.workers} rank(s) need {num} CUDA device(s), "
            f"this machine has {here}; use --cpu, or --address of a cluster"
        )


def find_plan(request: SweepRequest) -> Plan:
    """Return the plan of the request: the one that its folder has, with more trials where it asks for more.

    Writes nothing. Raises UserError where the sweep was begun otherwise.
    """
    from resnet_dist.sweep.on_tune.draw import draw  # Here, because Ray's import takes seconds.

    wanted = plan_without_trials(request.texts, request.seed, request.metric, request.recipe)
    drawing = partial(draw, request.searches, request.seed)
    known = read_plan(request.folder)
    return planned(known, wanted, request.recipe, request.names, request.num_trials, drawing)


def check_plan(request: SweepRequest, plan: Plan) -> None:
    """Check every trial before the first is trained, and values that none has drawn. Raises UserError."""
    titles: dict[str, str] = {}
    for trial in plan.trials:
        title = f"trial {trial.name} ({', '.join(trial.sets)})"
        try:
            of_trial = request.of_trial(trial, {}, gpu=None, cpus=None)
        except RecipeError as error:
            raise UserError(f"{title}: {error}") from None
        check_trial(of_trial, title)
        # Values that are typed in two ways, such as 0.1 and 1e-1, are one recipe.
        if (same := titles.setdefault(of_trial.recipe.to_json(), title)) != title:
            raise UserError(f"{title}: has the recipe of {same}; give each value of --search once")
    drawn = {text for trial in plan.trials for text in trial.sets}
    for search in request.searches:
        for value in search.choices:
            if f"{search.field}={value}" not in drawn:
                check_value(request.recipe, search.field, value)


class _Sweep:
    """A sweep whose folder is held: its plan grows by the outcomes of its trials."""

    def __init__(self, request: SweepRequest, plan: Plan, reporter: Reporter) -> None:
        self._request, self._plan, self._reporter = request, plan, reporter
        self._publisher: GroupPublisher | None = None

    def run(self, open_group: OpenGroup) -> SweepSummary:
        request = self._request
        status: Status = "FAILED"
        summary: SweepSummary | None = None
        try:
            with handle_signals(raise_interrupt), ExitStack() as stack:
                room = self._connect(stack)
                self._plan.write(request.folder)
                record = GroupRecord(
                    request, request.full_name, request.folder, request.source, request.output
                )
                # An interrupt inside `open_group` would leave an MLflow run that nobody closes.
                with defer_signals():
                    self._publisher = open_group(record)
                interrupted = room is not None and self._run_trials(room, self._publisher)
            status = "KILLED" if interrupted else "FINISHED" if not self._left else "FAILED"
        except KeyboardInterrupt:
            status = "KILLED"
        finally:
            if self._publisher is not None:
                summary = self._report_and_close(self._publisher, status)
        if status == "KILLED" or summary is None:
            raise SweepInterrupted(self._plan)
        return summary

    @property
    def _left(self) -> list[PlannedTrial]:
        return [trial for trial in self._plan.trials if not trial.has_result]

    def _connect(self, stack: ExitStack) -> Room | None:
        """Prepare the data, connect to Ray and find the room for the trials; return None where all have a result.

        stack: keeps the connection. Raises UserError where the cluster is too small.
        """
        request, left = self._request, self._left
        if done := len(self._plan.trials) - len(left):
            self._reporter.note(f"{done} of {len(self._plan.trials)} trials have a result already")
        if not left:
            return None
        recipes = [request.of_trial(trial, {}, gpu=None, cpus=None).recipe for trial in left]
        for recipe in recipes:
            prepare_missing(recipe, self._reporter, request.output)
        with defer_signals():  # An exception in the middle of Ray's import would leave it broken.
            from resnet_dist.launch.on_ray.launcher import shared_ray
            from resnet_dist.sweep.room import find_room
        ranks = WorkerRange.exactly(request.workers * (request.concurrent or 1))
        stack.enter_context(
            shared_ray(ranks, gpu=request.gpu, address=request.address, report=self._reporter.note)
        )
        return find_room(request, recipes)

    def _run_trials(self, room: Room, publisher: GroupPublisher) -> bool:
        """Run the trials that are left; report whether they were interrupted."""
        from resnet_dist.sweep.on_tune.asha import scheduler_of
        from resnet_dist.sweep.on_tune.experiment import run_trials

        request, left, tags = self._request, self._left, publisher.member_tags()
        requests = {trial.name: request.of_trial(trial, tags, gpu=room.gpu, cpus=room.cpus) for trial in left}
        stop_file = request.folder / STOP_FILE
        watch = Watch(requests, request.metric, stop_file, self._reporter.note, self._end)
        scheduler = scheduler_of(request.scheduler, request.metric, self._plan.mode, watch, self._earlier)
        self._reporter.note(f"{len(left)} trials, {room.concurrent} at a time with {room.cpus} CPU(s) a rank")
        if room.limit:
            self._reporter.note(room.limit)
        return run_trials(
            requests,
            request.metric,
            stop_file,
            scheduler=scheduler,
            room=room,
            watch=watch,
            max_restarts=request.max_restarts,
        )

    def _end(self, name: str, outcome: Outcome) -> None:
        """Take the end of a trial."""
        self._plan = self._plan.ended(name, outcome)
        self._plan.write(self._request.folder)
        trial = next(one for one in self._plan.trials if one.name == name)
        value = "" if outcome.value is None else f", {self._plan.metric} {outcome.value:.4g}"
        reason = f": {outcome.reason}" if outcome.reason else ""
        self._reporter.note(f"{name} ({', '.join(trial.sets)}) {outcome.state}{value}{reason}")

    def _earlier(self) -> Mapping[str, Sequence[Report]]:
        """Return what trials reported in earlier processes, by name, as their spools have it."""
        found = {}
        for trial in self._plan.trials:
            run = self._run_of(trial.name)
            if run is None:
                continue
            recipe = self._request.of_trial(trial, {}, gpu=None, cpus=None).recipe
            total, metric = total_steps_of(recipe), self._request.metric
            found[trial.name] = [
                evaluation(entry, metric, total)
                for entry in Follower(run.spool).read()
                if is_finite(entry.metrics.get(metric)) and entry.step is not None and entry.step < total
            ]
        return found

    def _run_of(self, name: str) -> RunFolder | None:
        return read_run(open_storage(self._request.output).at(RUNS_FOLDER).at(name))

    def _report_and_close(self, publisher: GroupPublisher, status: Status) -> SweepSummary | None:
        """Draw what has ended, and close the sweep's MLflow run whatever happens.

        Raises SweepInterrupted after SIGINT or SIGTERM, and what `report` raises.
        """
        request, summary = self._request, None
        try:
            if any(trial.outcome is not None for trial in self._plan.trials):
                summary = report(self._plan, request.searches, request.folder)
                publisher.log_files(summary.figure, summary.table, summary.values)
        except KeyboardInterrupt:
            status = "KILLED"
            raise SweepInterrupted(self._plan) from None
        except BaseException:
            status = "FAILED"
            raise
        finally:
            publisher.close(status, conclude(self._plan))
        if publisher.unsent and status != "FINISHED":  # A finished sweep is summed up by the command.
            self._reporter.note(f"sweep {request.full_name}: {unsent_line(request.folder, publisher.unsent)}")
        if summary is None:
            return None
        runs = [run for trial in self._plan.trials if (run := self._run_of(trial.name)) is not None]
        return replace(summary, runs=tuple(runs), unsent=publisher.unsent)


def total_steps_of(recipe: Recipe) -> int:
    """Return the steps of a run of the recipe, whose data is prepared."""
    return TrainPlan.of(recipe, order_of(recipe, read_index(recipe.data.train))).total


def command_of(request: SweepRequest, sets: Sequence[str]) -> str:
    """Return the command that trains the recipe with the values of a trial."""
    words = [word for text in (*request.overrides, *sets) for word in ("--set", text)]
    return shown(["resnet-dist", "train", request.source, *words])
