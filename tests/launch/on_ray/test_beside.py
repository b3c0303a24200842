"""Evaluations beside training: each checkpoint once, the oldest first, again where one fails; nothing is lost."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resnet_dist.config import Recipe
from resnet_dist.errors import RankFailed
from resnet_dist.launch.on_ray import beside as beside_module
from resnet_dist.launch.on_ray.beside import (
    MAX_TRIES,
    BesideEvaluations,
    CannotEvaluate,
    catch_up,
    reason_of,
    settle,
    started,
)
from resnet_dist.launch.on_ray.nodes import Node, Reserved, room_beside
from resnet_dist.launch.outstanding import Journal
from resnet_dist.runs.evaluations import Evaluated, EvaluationResults
from resnet_dist.runs.folder import RunFolder, stored_recipe
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.spool import Follower, Spool
from resnet_dist.train.checkpoint.folder import best_checkpoint, list_checkpoints
from resnet_dist.train.loop import Outcome, train
from resnet_dist.world import World
from tests.train.runs import Recorder

A, B = "a" * 56, "b" * 56  # ids of nodes, as Ray has them
ROOM = [Node(4, 0, "a", A)]
FINISHED = Outcome(8, 8, {"train/loss": 1.0}, True)


class FakeRay:
    """Calls that have their result at once: that of `answers`, by step, in order; an exception is raised."""

    def __init__(self, answers: dict[int, list[Any]]) -> None:
        self.answers, self.evaluated, self.killed, self.broken = answers, list[int](), 0, False

    def remote(self, kind: type) -> Any:
        actor = SimpleNamespace(
            ready=SimpleNamespace(remote=lambda: "ready"), evaluate=SimpleNamespace(remote=self.evaluate)
        )
        made = SimpleNamespace(remote=lambda *arguments, **options: actor)
        return SimpleNamespace(options=lambda **options: made)

    def evaluate(self, location: str) -> int:
        self.evaluated.append(int(location.rpartition("-")[2]))
        return self.evaluated[-1]

    def wait(self, calls: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return calls, []

    def get(self, call: Any) -> Any:
        if call == "ready":
            if self.broken:
                raise RuntimeError("no such shard\nmore")
            return None
        answer = self.answers[call].pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer, None, []

    def kill(self, actor: Any) -> None:
        self.killed += 1


@pytest.fixture
def recipe(digits_recipe: Recipe) -> Recipe:
    return digits_recipe.with_overrides(
        [
            "train.length=8 steps",
            "train.eval_every=2 steps",
            "train.checkpoint_every=0 steps",
            "train.keep_checkpoints=1",
            "train.best_metric=eval/loss",
            "train.evaluate=beside",
        ]
    )


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> RunFolder:
    """Return a run whose ranks have ended, and whose four checkpoints nobody has evaluated."""
    place = open_storage(tmp_path / "runs/x")
    made = RunFolder(place, "x", None, 1, stored_recipe(recipe))
    made.write()
    with Spool(made.spool) as spool:
        outcome = train(recipe, place.location, World.single(), spool, logged=())
    assert outcome.finished
    assert "eval/loss" not in outcome.metrics
    assert outstanding(made) == [2, 4, 6, 8]
    return made


def outstanding(run: RunFolder) -> list[int]:
    return list(Journal(run, None, 1).outstanding())


def with_ray(
    monkeypatch: pytest.MonkeyPatch, answers: dict[int, list[Any]], alive: list[Node] = ROOM
) -> FakeRay:
    fake = FakeRay(answers)
    clock = itertools.count()
    monkeypatch.setattr(beside_module, "ray", fake)
    monkeypatch.setattr(beside_module, "nodes", lambda: alive)
    monkeypatch.setattr(beside_module, "free_resources", lambda: "0 CPUs and 0 GPUs")
    monkeypatch.setattr(
        beside_module, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None)
    )
    return fake


def metrics_of(step: int, loss: float) -> dict[str, float]:
    return {"eval/loss": loss, "eval/top1": step / 10, "eval/samples": 360.0}


def logged(run: RunFolder) -> list[tuple[int | None, float]]:
    entries = Follower(run.spool).read()
    return [(one.step, one.metrics["eval/loss"]) for one in entries if "eval/loss" in one.metrics]


def never() -> bool:
    return False


LOSSES = {2: 0.5, 4: 0.1, 6: 0.3, 8: 0.2}


def test_all_are_evaluated_once_and_the_best_is_kept(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = with_ray(monkeypatch, {step: [metrics_of(step, loss)] for step, loss in LOSSES.items()})
    lines = list[str]()
    evaluations = BesideEvaluations(recipe, lines.append, gpu=False)
    outcome = settle(evaluations, run, FINISHED, never)
    assert fake.evaluated == [2, 4, 6, 8]
    assert outcome is not None
    assert outcome.metrics == {"train/loss": 1.0, **metrics_of(8, 0.2)}
    assert logged(run) == list(LOSSES.items())
    assert lines == ["4 evaluation(s) are outstanding, of steps 2, 4, 6, 8"]
    assert best_checkpoint(run.checkpoints) == "step-00000004"
    assert list_checkpoints(run.checkpoints) == ["step-00000004", "step-00000008"]
    # The same again changes nothing: the journal has it.
    assert settle(evaluations, run, FINISHED, never) == outcome
    assert fake.evaluated == [2, 4, 6, 8]
    assert logged(run) == list(LOSSES.items())


def test_a_resumed_rank_logs_only_what_is_not_there(recipe: Recipe, run: RunFolder, tmp_path: Path) -> None:
    results = EvaluationResults(run.storage)
    for step in (2, 4):
        results.write(Evaluated(step, metrics_of(step, LOSSES[step])))
    recorder = Recorder()
    train(recipe, run.location, World.single(), recorder, logged={2})
    assert {key: value for key, value in recorder.metrics.items() if key[0] == "eval/loss"} == {
        ("eval/loss", 4): 0.1
    }


def test_a_failure_is_tried_again_and_then_named(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[int, list[Any]] = {step: [metrics_of(step, loss)] for step, loss in LOSSES.items()}
    answers[2] = [RuntimeError("lost"), *answers[2]]
    answers[6] = [RuntimeError("bad\nmore")] * MAX_TRIES
    fake, lines = with_ray(monkeypatch, answers), list[str]()
    outcome = settle(BesideEvaluations(recipe, lines.append, gpu=False), run, FINISHED, never)
    assert outcome is not None
    assert outcome.finished
    assert fake.evaluated == [2, 2, 4, 6, 6, 6, 8]
    assert lines[1:] == [
        "the evaluation of step 2 failed (lost); it is tried again (2 of 3)",
        "the evaluation of step 6 failed (bad); it is tried again (2 of 3)",
        "the evaluation of step 6 failed (bad); it is tried again (3 of 3)",
        "the checkpoint of step 6 is not evaluated: bad",
    ]
    assert [step for step, _ in logged(run)] == [2, 4, 8]
    results = EvaluationResults(run.storage).read()
    assert [one.problem for one in results] == [None, None, "bad", None]


def test_an_interruption_leaves_the_rest_for_the_next_command(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_ray(monkeypatch, {2: [metrics_of(2, 0.5)]})
    evaluations = BesideEvaluations(recipe, lambda text: None, gpu=False)
    outcome = settle(evaluations, run, FINISHED, lambda: bool(EvaluationResults(run.storage).read()))
    assert outcome is not None
    assert not outcome.finished
    assert outstanding(run) == [4, 6, 8]
    assert len(list_checkpoints(run.checkpoints)) == 4


def test_without_room_the_ranks_evaluate_and_what_is_left_comes_first(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = with_ray(monkeypatch, {step: [metrics_of(step, loss)] for step, loss in LOSSES.items()})
    placer: Any = SimpleNamespace(sizes=[4], reserved=Reserved("gone", 1, 0))
    lines = list[str]()
    evaluations = BesideEvaluations(recipe, lines.append, gpu=False)
    assert started(evaluations, run, placer, None, never) is None
    assert placer.reserved is None
    assert lines[0].startswith(
        "train.evaluate='beside': no CPU is left beside the ranks (0 CPUs and 0 GPUs are free)"
    )
    assert fake.evaluated == [2, 4, 6, 8]
    assert logged(run) == list(LOSSES.items())
    assert fake.killed == 1
    roomy: Any = SimpleNamespace(sizes=[2], reserved=None)
    assert started(evaluations, run, roomy, None, never) is evaluations
    assert roomy.reserved == Reserved(A, 2, 0)  # of four CPUs; two ranks keep the one that they would have


def test_a_process_that_cannot_start_is_named_and_the_ranks_evaluate(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = RunFolder(open_storage(tmp_path / "new"), "new", None, 1, stored_recipe(recipe))
    with_ray(monkeypatch, {}).broken = True
    placer: Any = SimpleNamespace(sizes=[1], reserved=None)
    lines = list[str]()
    assert started(BesideEvaluations(recipe, lines.append, gpu=False), new, placer, None, never) is None
    assert lines == ["train.evaluate='beside': it cannot start: no such shard: the ranks evaluate"]
    assert placer.reserved is None


def test_a_cluster_without_any_room_is_given_up(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_ray(monkeypatch, {}, alive=[])
    evaluations = BesideEvaluations(recipe, lambda text: None, gpu=False)
    with pytest.raises(RankFailed, match=r"no evaluation could begin in 600 s: no CPU is left"):
        evaluations.finish(run, never)


@pytest.mark.parametrize(
    ("alive", "sizes", "gpu", "expected"),
    [
        ([Node(2, 0, "a", A)], [2], False, None),
        ([Node(2, 0, "a", A)], [1], False, Reserved(A, 1, 0)),
        ([Node(2, 0, "a", A)], [], False, Reserved(A, 2, 0)),
        # Ranks keep their number, and their CPUs where another node has room.
        ([Node(8, 0, "a", A), Node(4, 0, "b", B)], [1], False, Reserved(B, 4, 0)),
        ([Node(8, 2, "a", A), Node(8, 1, "b", B)], [2], True, Reserved(A, 1, 1)),
        ([Node(8, 2, "a", A), Node(6, 0, "b", B)], [2], True, Reserved(B, 6, 0)),
    ],
)
def test_the_room_beside_the_ranks(
    alive: list[Node], sizes: list[int], gpu: bool, expected: Reserved | None
) -> None:
    assert room_beside(alive, sizes, None, gpu=gpu) == expected


def test_a_checkpoint_that_awaits_is_written_though_newer_ones_come(recipe: Recipe, tmp_path: Path) -> None:
    weights: list[bytes] = []
    for name, logged_steps in (("inline", None), ("beside", ())):
        train(recipe, tmp_path / name, World.single(), Recorder(), logged=logged_steps)
        weights.append((tmp_path / name / "checkpoints/step-00000008/model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert len(list_checkpoints(open_storage(tmp_path / "beside/checkpoints"))) == 4
