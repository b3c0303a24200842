"""The driver of a sweep without Ray: what is trained, what is kept on every way out, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.config import Recipe
from resnet_dist.driver.request import Request
from resnet_dist.errors import RankFailed, UserError
from resnet_dist.launch.on_ray import launcher
from resnet_dist.runs.group_folder import STUDY_TAG, SWEEP_TAG, GroupHeld, groups_in, held, read_group
from resnet_dist.sweep import room
from resnet_dist.sweep.on_tune import experiment
from resnet_dist.sweep.plan import Outcome, read_plan
from resnet_dist.sweep.request import SweepRequest
from resnet_dist.sweep.run import SweepInterrupted, command_of, run_sweep
from resnet_dist.sweep.search import read_searches
from resnet_dist.tracking.open import open_group
from resnet_dist.tracking.protocol import GroupRecord
from tests.reporter import RecordingReporter

TEXTS = ("optim.lr=log:0.01..1", "model.name=resnet8,resnet20")


class Publisher:
    """A GroupPublisher that records."""

    unsent: tuple[str, ...] = ()

    def __init__(self, record: GroupRecord) -> None:
        self.record = record
        self.files: list[str] = []
        self.ends: list[tuple[str, str]] = []

    def member_tags(self) -> dict[str, str]:
        return {SWEEP_TAG: self.record.name}

    def is_finished(self, run_id: str) -> bool:
        return False

    def log_files(self, *files: Path) -> None:
        self.files += [file.name for file in files if file.exists()]

    def close(self, status: str, conclusion: str) -> None:
        self.ends.append((status, conclusion))


@pytest.fixture
def request_of(digits_recipe: Recipe, tmp_path: Path) -> SweepRequest:
    searches = read_searches(TEXTS, digits_recipe)
    return SweepRequest(digits_recipe, digits_recipe, "digits.py", tmp_path, TEXTS, searches, 3, gpu=False)


Trials = Callable[[dict[str, Request], Any], bool]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Replace Ray; return a list whose first item, a Trials, is called in place of Ray Tune."""
    calls: list[Any] = []

    @contextmanager
    def no_ray(*arguments: Any, **options: Any) -> Iterator[None]:
        yield

    def run_trials(requests: dict[str, Request], *arguments: Any, watch: Any, **options: Any) -> bool:
        result: bool = calls[0](requests, watch)
        return result

    monkeypatch.setattr(launcher, "shared_ray", no_ray)
    monkeypatch.setattr(room, "find_room", lambda request, recipes: room.Room(2, 1, 1, gpu=False))
    monkeypatch.setattr(experiment, "run_trials", run_trials)
    return calls


def run(request: SweepRequest) -> tuple[Any, Publisher, list[str]]:
    reporter, publishers = RecordingReporter(), list[Publisher]()

    def opened(record: GroupRecord) -> Publisher:
        publishers.append(Publisher(record))
        return publishers[0]

    try:
        summary: Any = run_sweep(request, reporter, opened)
    except (SweepInterrupted, RankFailed) as error:
        summary = error
    return summary, publishers[0], reporter.notes


def test_trials_with_a_result_are_not_repeated(request_of: SweepRequest, trained: list[Any]) -> None:
    begun: list[list[str]] = []

    def interrupted(requests: dict[str, Request], watch: Any) -> bool:
        begun.append(list(requests))
        for request in requests.values():
            assert request.local
            assert request.cpus == 1
            assert request.also == ("tensorboard",)
            assert request.tags == {SWEEP_TAG: "digits-sweep"}
            assert "optim.lr=" in request.changes
        watch.ended("digits-sweep-001", Outcome("finished", 0.5, 24))
        watch.ended("digits-sweep-002", Outcome("interrupted", 0.4, 6))
        return True

    trained.append(interrupted)
    request_of = replace(request_of, also=("tensorboard",))
    end, publisher, _ = run(request_of)
    assert isinstance(end, SweepInterrupted)
    assert (end.num_results, end.num_trials, end.exit_code) == (1, 3, 130)
    assert publisher.ends[0][0] == "KILLED"
    assert publisher.files == ["figure.png", "runs.csv", "sweep.json"]
    plan = read_plan(request_of.folder)
    assert plan is not None

    def to_the_end(requests: dict[str, Request], watch: Any) -> bool:
        begun.append(list(requests))
        watch.ended("digits-sweep-002", Outcome("diverged", reason="the training loss is nan"))
        watch.ended("digits-sweep-003", Outcome("stopped", 0.2, 6))
        return False

    trained[0] = to_the_end
    summary, publisher, notes = run(request_of)
    assert "1 of 3 trials have a result already" in notes
    assert any("diverged: the training loss is nan" in note for note in notes)
    assert publisher.ends[0][0] == "FINISHED"
    assert summary.conclusion.startswith("best eval/top1 50.00% with optim.lr=")
    assert summary.conclusion.endswith("(3 trials: 1 diverged, 1 finished, 1 stopped)")
    assert [trial.sets for trial in summary.plan.trials] == [trial.sets for trial in plan.trials]
    assert json.loads((request_of.folder / "sweep.json").read_text())["best"] == "digits-sweep-001"
    best = summary.plan.best()
    command = command_of(replace(request_of, overrides=("train.length=2 epochs",)), best.sets)
    assert command.startswith("resnet-dist train digits.py --set 'train.length=2 epochs' --set optim.lr=")

    trained[0] = lambda requests, watch: pytest.fail("trained again")
    again, publisher, _ = run(request_of)
    assert again.plan == summary.plan
    assert publisher.ends[0][0] == "FINISHED"
    assert begun == [[f"digits-sweep-00{n}" for n in (1, 2, 3)], [f"digits-sweep-00{n}" for n in (2, 3)]]


def test_the_command_of_the_best_trial_has_no_password(request_of: SweepRequest) -> None:
    secret = replace(request_of, overrides=("data.train=https://anna:hush@h/index.json",))
    command = command_of(secret, ("optim.lr=0.1",))
    assert "hush" not in command
    assert "--set 'data.train=https://***@h/index.json' --set optim.lr=0.1\n" in command


def test_a_trial_that_failed_is_named_and_tried_again(request_of: SweepRequest, trained: list[Any]) -> None:
    begun: list[str] = []

    def fails(requests: dict[str, Request], watch: Any) -> bool:
        begun.extend(requests)
        for name in requests:
            failed = Outcome("failed", reason="the disk is full")
            watch.ended(name, failed if name.endswith("2") else Outcome("finished", 0.5, 24))
        return False

    trained.append(fails)
    summary, publisher, _ = run(request_of)
    assert [trial.name for trial in summary.left] == ["digits-sweep-002"]
    assert publisher.ends[0][0] == "FAILED"
    run(request_of)
    assert begun[3:] == ["digits-sweep-002"]


def test_what_has_ended_is_kept_where_the_trials_cannot_go_on(
    request_of: SweepRequest, trained: list[Any]
) -> None:
    def lost(requests: dict[str, Request], watch: Any) -> bool:
        watch.ended("digits-sweep-001", Outcome("finished", 0.5, 24))
        raise RankFailed("Ray Tune ended: x")

    trained.append(lost)
    end, publisher, _ = run(request_of)
    assert isinstance(end, RankFailed)
    assert publisher.ends[0][0] == "FAILED"
    plan = read_plan(request_of.folder)
    assert plan is not None
    assert plan.trials[0].has_result


@pytest.mark.parametrize(
    ("texts", "num", "sentence"),
    [
        (("data.lanes=3,8",), 2, r"trial digits-sweep-00\d \(data\.lanes=3\): data: .* lanes from \[1, 2"),
        (
            ("model.name=resnet8,resnet9",),
            2,
            r"trial digits-sweep-00\d \(model\.name=resnet9\): model\.name='resnet9'",
        ),
        (("model.name=resnet8,resnet20",), 3, r"--trials 3: the searches have 2 different trials"),
        (
            ("optim.lr=0.1,1e-1",),
            2,
            r"trial digits-sweep-002 \(.*\): has the recipe of trial digits-sweep-001 \(optim\.lr=.*; give each value",
        ),
        (
            ("train.evaluate=beside,inline",),
            2,
            r"trial digits-sweep-00\d \(.*\): train\.evaluate='beside': --local",
        ),
        (("optim.nesterov=true,maybe", "seed=int:0..99"), 1, r"optim\.nesterov='maybe'"),
    ],
)
def test_a_mistake_is_refused_before_anything_starts(
    request_of: SweepRequest, trained: list[Any], texts: tuple[str, ...], num: int, sentence: str
) -> None:
    searches = read_searches(texts, request_of.recipe)
    request = replace(request_of, texts=texts, searches=searches, num_trials=num)
    with pytest.raises(UserError, match=sentence):
        run_sweep(request, RecordingReporter(), Publisher)
    assert not request.folder.exists()


def test_a_second_command_leaves_the_folder_of_the_first(request_of: SweepRequest) -> None:
    with held(request_of.folder):  # The first one prepares its data: there is no plan yet.
        with pytest.raises(GroupHeld, match="is being trained by another process"):
            run_sweep(request_of, RecordingReporter(), Publisher)
        assert (request_of.folder / ".lock").exists()


def test_a_sweep_that_cannot_begin_removes_its_own_folder_alone(
    request_of: SweepRequest, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_small(request: SweepRequest, num: int) -> None:
        assert request.folder.exists()
        raise UserError("the cluster is too small")

    monkeypatch.setattr(room, "find_room", too_small)
    for made_before in (False, True):
        if made_before:
            request_of.folder.mkdir()
            (request_of.folder / "notes.txt").touch()
        with pytest.raises(UserError, match="too small"):
            run_sweep(request_of, RecordingReporter(), Publisher)
        assert request_of.folder.exists() == made_before


@pytest.mark.parametrize(
    ("error", "status", "raised"),
    [
        (OSError("No space left"), "FAILED", OSError),
        (KeyboardInterrupt(), "KILLED", SweepInterrupted),
    ],
)
def test_a_sweep_that_cannot_be_drawn_is_not_closed_as_finished(
    request_of: SweepRequest,
    trained: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: str,
    raised: type[BaseException],
) -> None:
    def to_the_end(requests: dict[str, Request], watch: Any) -> bool:
        for name in requests:
            watch.ended(name, Outcome("finished", 0.5, 24))
        return False

    def fails(*arguments: Any) -> None:
        raise error

    trained.append(to_the_end)
    monkeypatch.setattr("resnet_dist.sweep.run.report", fails)
    publishers: list[Publisher] = []

    def opened(record: GroupRecord) -> Publisher:
        publishers.append(Publisher(record))
        return publishers[-1]

    with pytest.raises(raised):
        run_sweep(request_of, RecordingReporter(), opened)
    assert [end[0] for end in publishers[0].ends] == [status]


def test_missing_gpus_leave_nothing_behind(request_of: SweepRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    request = replace(request_of, gpu=True, concurrent=3)
    with pytest.raises(
        UserError, match=r"--gpu: 3 trial\(s\) at a time .* need 3 CUDA device\(s\), .* has 1"
    ):
        run_sweep(request, RecordingReporter(), Publisher)
    assert not request.folder.exists()


@pytest.mark.long
def test_a_sweep_is_kept_as_a_study_is(request_of: SweepRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    request = request_of
    publisher = open_group(
        GroupRecord(request, request.full_name, request.folder, request.source, request.output)
    )
    tags = publisher.member_tags()
    assert tags[SWEEP_TAG] == "digits-sweep"
    assert STUDY_TAG not in tags
    (request.folder / "sweep.json").write_text("{}")
    publisher.log_files(request.folder / "sweep.json")
    publisher.close("FINISHED", "best")
    assert groups_in(request.output) == [request.folder]
    kept = read_group(request.folder)
    assert kept is not None
    assert (kept.title, kept.status, kept.conclusion) == ("sweep digits-sweep", "FINISHED", "best")
    assert [file.name for file in kept.files] == ["sweep.json"]
    assert (request.folder / "parent.json").exists()
