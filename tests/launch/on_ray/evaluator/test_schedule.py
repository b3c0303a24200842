"""Evaluations beside training: each checkpoint once, the oldest first, again where one fails; nothing is lost."""

from __future__ import annotations

import itertools
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayTaskError

from resnet_dist.config import Recipe
from resnet_dist.errors import RankFailed, StorageError, TrainingError
from resnet_dist.launch.local import local_launcher
from resnet_dist.launch.on_ray.evaluator import process, schedule
from resnet_dist.launch.on_ray.evaluator.before_and_after import catch_up, settle, started
from resnet_dist.launch.on_ray.evaluator.process import reason_of
from resnet_dist.launch.on_ray.evaluator.schedule import MAX_TRIES, BesideEvaluations, CannotEvaluate
from resnet_dist.launch.on_ray.placement.fit import Node
from resnet_dist.launch.on_ray.placement.reserved import Reserved
from resnet_dist.launch.outstanding import Journal
from resnet_dist.runs.choose import may_change
from resnet_dist.runs.evaluation_results import Evaluated, EvaluationResults
from resnet_dist.runs.folder import RunFolder, stored_recipe
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.spool import REMOVED, Follower, Spool
from resnet_dist.train.checkpoint.folder import best_checkpoint, list_checkpoints
from resnet_dist.train.loop import Outcome, train
from resnet_dist.world import World
from tests.train.runs import Recorder

A, B, C = "a" * 56, "b" * 56, "c" * 56  # ids of nodes, as Ray has them
ROOM = [Node(4, 0, "a", A)]
FINISHED = Outcome(8, 8, {"train/loss": 1.0}, True)


class FakeRay:
    """Calls that have their result at once: that of `answers`, by step, in order; an exception is raised."""

    def __init__(self, answers: dict[int, list[Any]]) -> None:
        self.answers, self.evaluated, self.killed = answers, list[int](), 0
        self.problems: list[Exception] = []  # that `ready` raises, one after the other; the last one stays
        self.places: list[str] = []  # nodes of the actors that were made

    def remote(self, kind: type) -> Any:
        actor = SimpleNamespace(
            ready=SimpleNamespace(remote=lambda: "ready"), evaluate=SimpleNamespace(remote=self.evaluate)
        )
        made = SimpleNamespace(remote=lambda *arguments, **options: actor)

        def options(**options: Any) -> Any:
            self.places.append(options["scheduling_strategy"].node_id)
            return made

        return SimpleNamespace(options=options)

    def evaluate(self, location: str) -> int:
        self.evaluated.append(int(location.rpartition("-")[2]))
        return self.evaluated[-1]

    def wait(self, calls: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return calls, []

    def get(self, call: Any) -> Any:
        if call == "ready":
            if self.problems:
                raise self.problems[0] if len(self.problems) == 1 else self.problems.pop(0)
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
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks), sleep=lambda seconds: None)
    for module in (schedule, process):
        monkeypatch.setattr(module, "ray", fake)
        monkeypatch.setattr(module, "nodes", lambda: list(alive))
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(schedule, "free_parts", lambda nodes: nodes)
    monkeypatch.setattr(process, "free_and_held", lambda: "0 of 2 CPUs are free")
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
    # The ranks have not begun, and all CPUs may be free.
    assert lines[0].startswith("train.evaluate='beside': no CPU is left beside the ranks (a has 4 CPUs and ")
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
    with_ray(monkeypatch, {}).problems = [RuntimeError("no such shard\nmore")]
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


def test_results_that_no_rank_has_logged_are_logged_before_ranks_evaluate(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks have died between the last result and their next look."""
    fake = with_ray(monkeypatch, {}, alive=[])
    results = EvaluationResults(run.storage)
    for step, loss in LOSSES.items():
        results.write(Evaluated(step, metrics_of(step, loss)))
    placer: Any = SimpleNamespace(sizes=[1], reserved=None)
    assert started(BesideEvaluations(recipe, lambda text: None, gpu=False), run, placer, None, never) is None
    assert fake.evaluated == []
    assert logged(run) == list(LOSSES.items())
    assert best_checkpoint(run.checkpoints) == "step-00000004"
    assert list_checkpoints(run.checkpoints) == ["step-00000004", "step-00000008"]
    # The tracker shows those that the driver has removed as removed.
    assert [entry.step for entry in Follower(run.spool).read() if entry.checkpoint == REMOVED] == [2, 6]


def test_older_results_do_not_replace_metrics_of_the_ranks(run: RunFolder) -> None:
    results = EvaluationResults(run.storage)
    for step in (2, 4, 6, 8):
        results.write(Evaluated(step, metrics_of(step, LOSSES[step])))
    with Spool(run.spool) as spool:
        spool.log(metrics_of(12, 0.05), 12)
    assert Journal(run, "eval/loss", 1).complete() == {}
    assert [step for step, _ in logged(run)] == [12, 2, 4, 6, 8]


def test_the_process_moves_where_ranks_need_its_place(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = [Node(8, 1, "a", A), Node(8, 1, "b", B), Node(8, 1, "c", C)]
    fake = with_ray(monkeypatch, {}, alive)
    evaluations = BesideEvaluations(recipe, lambda text: None, gpu=True)
    assert evaluations.start([2, 1], None, never) is None
    assert evaluations.part is not None
    assert evaluations.part.gpus == 1
    alive.pop(1 if evaluations.part.node_id == A else 0)  # not the node of the process
    assert evaluations.start([2, 1], None, never) is None
    assert evaluations.part is not None
    assert evaluations.part.gpus == 0  # Two ranks have the two GPUs.
    assert fake.killed == 1


def test_a_lost_node_is_no_failure_of_the_evaluation(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = [Node(4, 0, "a", A), Node(8, 0, "b", B)]
    lost = ActorUnschedulableError("the node is gone")
    answers: dict[int, list[Any]] = {step: [metrics_of(step, loss)] for step, loss in LOSSES.items()}
    answers[2] = [lost, *answers[2]]
    fake, lines = with_ray(monkeypatch, answers, alive), list[str]()
    evaluations = BesideEvaluations(recipe, lines.append, gpu=False)
    assert evaluations.start([1], None, never) is None
    first = fake.places[-1]
    assert evaluations.look(run)
    alive[:] = [node for node in alive if node.node_id != first]
    fake.problems = [lost]
    for _ in range(50):
        evaluations.look(run)
        if fake.places != [first]:
            fake.problems = []
    assert [one.step for one in EvaluationResults(run.storage).read()] == [2, 4, 6, 8]
    assert fake.places == [first, alive[0].node_id]
    assert lines == []
    assert evaluations._failures == {}


def test_a_process_that_is_lost_again_and_again_counts(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[int, list[Any]] = {step: [metrics_of(step, loss)] for step, loss in LOSSES.items()}
    answers[2] = [ActorDiedError()] * MAX_TRIES
    fake, lines = with_ray(monkeypatch, answers), list[str]()
    outcome = settle(BesideEvaluations(recipe, lines.append, gpu=False), run, FINISHED, never)
    assert outcome is not None
    assert fake.evaluated == [2, 2, 2, 4, 6, 8]
    reason = "The actor died unexpectedly before finishing this task."
    assert lines[-1] == f"the checkpoint of step 2 is not evaluated: {reason}"


def test_what_another_try_would_find_again_is_recorded_at_once(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[int, list[Any]] = {step: [metrics_of(step, loss)] for step, loss in LOSSES.items()}
    answers[4] = [RayTaskError("evaluate", "trace", TrainingError("eval/loss is nan")).as_instanceof_cause()]
    answers[6] = [StorageError("no answer"), *answers[6]]
    fake, lines = with_ray(monkeypatch, answers), list[str]()
    settle(BesideEvaluations(recipe, lines.append, gpu=False), run, FINISHED, never)
    assert fake.evaluated == [2, 4, 6, 6, 8]
    assert lines[1:] == [
        "the checkpoint of step 4 is not evaluated: eval/loss is nan",
        "the evaluation of step 6 failed (no answer); it is tried again (2 of 3)",
    ]


def test_the_cause_of_a_start_that_failed_is_named() -> None:
    try:
        raise StorageError("/data/eval/index.json: no such file")
    except StorageError as cause:
        error = RayTaskError("Evaluator.__init__", traceback.format_exc(), cause, actor_id="a" * 32)
    assert reason_of(ActorDiedError(error)) == "/data/eval/index.json: no such file"
    assert reason_of(ActorDiedError()) == "The actor died unexpectedly before finishing this task."


def test_a_process_that_cannot_start_does_not_keep_ranks_waiting(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, lines = with_ray(monkeypatch, {}), list[str]()
    fake.problems = [RuntimeError("no such shard")]
    with pytest.raises(CannotEvaluate, match="no evaluation could begin: it cannot start: no such shard"):
        BesideEvaluations(recipe, lines.append, gpu=False).finish(run, never)
    assert len(fake.places) == MAX_TRIES
    assert outstanding(run) == [2, 4, 6, 8]
    catch_up(BesideEvaluations(recipe, lines.append, gpu=False), run, never)
    assert outstanding(run) == []
    assert [one.problem for one in EvaluationResults(run.storage).read()] == [
        "no evaluation could begin: it cannot start: no such shard"
    ] * 4
    assert lines[-1].startswith("the checkpoint of step 8 is not evaluated: no evaluation could begin")


def test_an_interrupted_start_reports_no_lack_of_room(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_ray(monkeypatch, {})
    lines, placer = list[str](), SimpleNamespace(sizes=[1], reserved=None)
    evaluations = BesideEvaluations(recipe, lines.append, gpu=False)
    assert started(evaluations, run, placer, None, lambda: True) is None  # type: ignore[arg-type]
    assert (lines, evaluations.part) == ([], None)


def test_a_damaged_result_is_named(run: RunFolder, monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    folder = Path(run.location) / "beside"
    folder.mkdir()
    (folder / "step-00000002.json").write_text("[1]")
    with pytest.raises(StorageError, match=r"beside/step-00000002.json: a damaged result"):
        outstanding(run)
    with_ray(monkeypatch, {})
    lines = list[str]()
    evaluations = BesideEvaluations(recipe, lines.append, gpu=False)
    assert evaluations.start([1], None, never) is None
    for _ in range(20):
        evaluations.look(run)
    (line,) = lines
    assert "step-00000002.json" in line


def test_a_manifest_that_is_no_object_awaits_nothing(run: RunFolder) -> None:
    (Path(run.checkpoints.location) / "step-00000008/checkpoint.json").write_text("[]")
    assert outstanding(run) == [2, 4, 6]


def test_results_are_read_once(recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = with_ray(monkeypatch, {step: [metrics_of(step, loss)] for step, loss in LOSSES.items()})
    read = list[str]()
    parse = EvaluationResults._parsed
    monkeypatch.setattr(
        EvaluationResults,
        "_parsed",
        lambda self, name, content: read.append(name) or parse(self, name, content),  # type: ignore[func-returns-value]
    )
    settle(BesideEvaluations(recipe, lambda text: None, gpu=False), run, FINISHED, never)
    assert fake.evaluated == [2, 4, 6, 8]
    assert len(read) == len(set(read)) == 4


def test_a_run_that_began_beside_continues_in_one_process(recipe: Recipe, run: RunFolder) -> None:
    inline, lines = recipe.with_overrides(["train.evaluate=inline"]), list[str]()
    assert may_change("train.evaluate", recipe, inline)
    outcome = local_launcher(inline, gpu=False, cpus=1, report=lines.append)(run)
    assert outcome is not None
    assert outcome.finished
    assert [step for step, _ in logged(run)] == [2, 4, 6, 8]
    assert lines == ["4 evaluation(s) are outstanding, of steps 2, 4, 6, 8"]
    assert outstanding(run) == []
    assert len(list_checkpoints(run.checkpoints)) <= 2


def test_a_checkpoint_that_awaits_is_written_though_newer_ones_come(recipe: Recipe, tmp_path: Path) -> None:
    weights: list[bytes] = []
    for name, logged_steps in (("inline", None), ("beside", ())):
        train(recipe, tmp_path / name, World.single(), Recorder(), logged=logged_steps)
        weights.append((tmp_path / name / "checkpoints/step-00000008/model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert len(list_checkpoints(open_storage(tmp_path / "beside/checkpoints"))) == 4
