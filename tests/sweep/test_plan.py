"""The plan of a sweep: drawn once, kept, extended, and refused where the request has changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from resnet_dist.config import Recipe
from resnet_dist.errors import UserError
from resnet_dist.sweep.plan import Outcome, Plan, plan_without_trials, planned, read_plan
from resnet_dist.sweep.report import conclude, ranked, table_lines, write_table

VALUES = [("optim.lr=0.1",), ("optim.lr=0.2",), ("optim.lr=0.3",), ("optim.lr=0.4",)]


def names(num: int) -> list[str]:
    return [f"s-{number:03}" for number in range(1, num + 1)]


def draw(num: int) -> list[tuple[str, ...]]:
    return VALUES[:num]


def wanted(recipe: Recipe, **changes: object) -> Plan:
    return replace(plan_without_trials(("optim.lr=0.1..0.4",), 0, "eval/top1", recipe), **changes)  # type: ignore[arg-type]


@pytest.fixture
def plan(digits_recipe: Recipe) -> Plan:
    return planned(None, wanted(digits_recipe), digits_recipe, names, 4, draw)


@pytest.fixture
def ended(plan: Plan) -> Plan:
    plan = plan.ended("s-001", Outcome("finished", 0.5, 24, {"eval/top1": 0.5}))
    plan = plan.ended("s-002", Outcome("stopped", 0.9, 6, {"eval/top1": 0.9}, "ASHA stopped it"))
    plan = plan.ended("s-003", Outcome("diverged", reason="the training loss is nan"))
    return plan.ended("s-004", Outcome("finished", 0.75, 24, {"eval/top1": 0.75}))


def test_a_plan_is_read_back_as_it_was_written(ended: Plan, tmp_path: Path) -> None:
    assert read_plan(tmp_path) is None
    ended.write(tmp_path)
    assert read_plan(tmp_path) == ended
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match=r"sweep\.json: not a sweep"):
        read_plan(tmp_path)


def test_more_trials_are_added_and_outcomes_stay(digits_recipe: Recipe) -> None:
    first = planned(None, wanted(digits_recipe), digits_recipe, names, 2, draw)
    first = first.ended("s-001", Outcome("finished", 0.5))
    more = planned(first, wanted(digits_recipe), digits_recipe, names, 4, draw)
    assert more.trials[:2] == first.trials
    assert [trial.name for trial in more.trials] == names(4)
    assert [trial.sets for trial in more.trials] == VALUES
    # A plan with all its trials is not drawn again: another version of Ray may draw others.
    assert planned(more, wanted(digits_recipe), digits_recipe, names, 4, lambda num: []) == more


def test_a_changed_request_is_refused(plan: Plan, digits_recipe: Recipe) -> None:
    def again(num: int = 4, recipe: Recipe = digits_recipe, **changes: object) -> None:
        planned(plan, wanted(recipe, **changes), recipe, names, num, draw)

    again(5 - 1)
    with pytest.raises(UserError, match=r"--seed 1: this sweep was begun with 0; give a new --name"):
        again(seed=1)
    with pytest.raises(UserError, match=r"--search optim\.lr=1,2: .*begun with optim\.lr=0\.1\.\.0\.4"):
        again(searches=("optim.lr=1,2",))
    with pytest.raises(UserError, match=r"--trials 3: .*begun with 4; give 4 or more"):
        again(3)
    with pytest.raises(UserError, match=r"train\.best_metric eval/loss"):
        again(metric="eval/loss")
    with pytest.raises(UserError, match=r"optim\.momentum was 0\.9, is 0\.5"):
        again(recipe=digits_recipe.with_overrides(["optim.momentum=0.5"]))
    again(recipe=digits_recipe.with_overrides(["train.log_every=1 steps"]))  # No curve depends on it.


def test_a_sweep_of_another_version_is_refused(plan: Plan, digits_recipe: Recipe) -> None:
    other = replace(plan, recipe={**plan.recipe, "momentum_of_old": 1})
    with pytest.raises(UserError, match=r"begun by another version of resnet_dist \(.*; give a new --name"):
        planned(other, wanted(digits_recipe), digits_recipe, names, 4, draw)


def test_the_best_was_trained_to_its_end(ended: Plan) -> None:
    best = ended.best()
    assert best is not None
    assert best.name == "s-004"
    assert list(best.sets) == ["optim.lr=0.4"]
    assert conclude(ended) == (
        "best eval/top1 75.00% with optim.lr=0.4 (4 trials: 1 diverged, 2 finished, 1 stopped)"
    )
    assert [trial.name for trial in ranked(ended)] == ["s-004", "s-001", "s-002", "s-003"]
    assert replace(ended, metric="eval/loss").best() == ended.trials[0]


def test_without_a_whole_trial_the_best_is_the_best_of_all(plan: Plan) -> None:
    assert plan.best() is None
    assert conclude(plan) == "4 trials: none ended, 4 left; none has a result"
    stopped = plan.ended("s-002", Outcome("stopped", 0.9, 6)).ended("s-001", Outcome("stopped", 0.5, 6))
    assert stopped.best() == stopped.trials[1]


def test_the_table_has_every_trial(ended: Plan, tmp_path: Path) -> None:
    lines = table_lines(ended)
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["s-004", "finished", "75.00%"],
        ["s-001", "finished", "50.00%"],
    ]
    assert lines[4].split() == ["s-003", "diverged", "-", "-", "0.3"]
    write_table(tmp_path / "runs.csv", ended)
    rows = (tmp_path / "runs.csv").read_text().splitlines()
    assert rows[0] == "run,state,optim.lr,eval/top1,step,reason"
    assert rows[3] == "s-003,diverged,0.3,,,the training loss is nan"
    assert [trial.has_result for trial in ended.trials] == [True] * 4
    assert not ended.ended("s-001", Outcome("failed", reason="disk full")).trials[0].has_result
