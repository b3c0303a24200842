"""The changes that a resumed run may make, and the lock that allows one attempt at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resnet_dist.config import Recipe
from resnet_dist.config.part import fields
from resnet_dist.driver.request import Request
from resnet_dist.driver.run import locked
from resnet_dist.errors import UserError
from resnet_dist.runs.choose import MAY_CHANGE, choose_run
from resnet_dist.runs.folder import RUN_FILE, RunFolder

NOW = ("a", "b")


@pytest.fixture
def started(digits_recipe: Recipe, tmp_path: Path) -> RunFolder:
    run = choose_run(tmp_path, digits_recipe, "x", resume=False).with_data(NOW)
    run.write()
    return run


def change(recipe: Recipe, key: str, value: str) -> Recipe:
    return recipe.with_overrides([f"{key}={value}"])


def test_the_list_names_fields_that_exist() -> None:
    assert {name for name, _ in fields(Recipe)} >= MAY_CHANGE


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.log_every", "7 steps"),
        ("train.checkpoint_minutes", "5"),
        ("train.best_metric", "eval/top1"),
        ("train.stall_timeout_seconds", "60"),
        ("train.keep_checkpoints", "9"),
        ("data.loader_workers", "3"),
        ("description", "more words"),
    ],
)
def test_what_no_curve_depends_on_may_change(
    started: RunFolder, digits_recipe: Recipe, tmp_path: Path, key: str, value: str
) -> None:
    changed = change(digits_recipe, key, value)
    assert changed != digits_recipe
    run = choose_run(tmp_path, changed, "x", resume=False)
    assert (run.attempt, run.key, run.data) == (2, started.key, list(NOW))
    assert Recipe.model_validate(run.recipe) == changed


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.lr", "0.3", "optim.lr was 0.1, is 0.3"),
        ("seed", "4", "seed was 0, is 4"),
        ("data.global_batch_size", "256", "data.global_batch_size was 128, is 256"),
        ("train.precision", "bf16", "train.precision was fp32, is bf16"),
        ("train.length", "30 steps", "train.length was 24 steps, is 30 steps"),
        ("schedule.decay", "constant", "schedule.decay was cosine, is constant"),
    ],
)
@pytest.mark.usefixtures("started")
def test_what_matters_is_refused_by_name(
    digits_recipe: Recipe, tmp_path: Path, key: str, value: str, message: str
) -> None:
    with pytest.raises(UserError, match=rf"run x was started with another recipe \({message}\); give a new"):
        choose_run(tmp_path, change(digits_recipe, key, value), "x", resume=True)


def test_a_field_must_stay_the_same_unless_it_is_listed(
    digits_recipe: Recipe, started: RunFolder, tmp_path: Path
) -> None:
    """Remove a field from the recipe of the run, as if it had been added to the package since."""
    value = json.loads((Path(started.location) / RUN_FILE).read_text())
    del value["recipe"]["train"]["label_smoothing"]
    (Path(started.location) / RUN_FILE).write_text(json.dumps(value))
    assert choose_run(tmp_path, digits_recipe, "x", resume=True).attempt == 2
    with pytest.raises(UserError, match=r"train\.label_smoothing was 0\.0, is 0\.1"):
        choose_run(tmp_path, change(digits_recipe, "train.label_smoothing", "0.1"), "x", resume=True)
    value["recipe"]["train"]["lost"] = 1
    (Path(started.location) / RUN_FILE).write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"another version of resnet_dist \(train\.lost is not a field"):
        choose_run(tmp_path, digits_recipe, "x", resume=True)


def test_a_constant_rate_may_be_kept_for_longer(digits_recipe: Recipe, tmp_path: Path) -> None:
    constant = change(digits_recipe, "schedule.decay", "constant")
    choose_run(tmp_path, constant, "x", resume=False).write()
    longer = choose_run(tmp_path, change(constant, "train.length", "90 steps"), "x", resume=True)
    assert longer.recipe["train"]["length"] == "90 steps"  # type: ignore[index]


def test_other_data_is_refused(digits_recipe: Recipe, started: RunFolder, tmp_path: Path) -> None:
    run = choose_run(tmp_path, digits_recipe, "x", resume=True)
    assert run.with_data(NOW).data == NOW
    with pytest.raises(UserError, match=r"run x was started on other data than data\.train=.*/train and"):
        run.with_data(("a", "c"))


def test_one_attempt_at_a_time(started: RunFolder) -> None:
    refused = pytest.raises(UserError, match="run x is being trained by another process")
    with started.lock(), refused, started.lock():
        pass
    with started.lock():
        pass
    assert Path(started.location).exists()


def test_the_lock_of_a_run_that_did_not_come_to_be_leaves_nothing(
    digits_recipe: Recipe, tmp_path: Path
) -> None:
    run = choose_run(tmp_path, digits_recipe, "y", resume=False)
    with run.lock():
        assert Path(run.location).exists()
    assert not (tmp_path / "runs").exists()


def test_two_that_begin_in_one_second_are_two_runs(digits_recipe: Recipe, tmp_path: Path) -> None:
    """Both chose the same name before either had its lock."""
    request = Request(digits_recipe, "jobs/digits.py", tmp_path, local=True)
    chosen = choose_run(tmp_path, digits_recipe, None, resume=False)
    with locked(request, chosen) as first:
        first.write()
        with locked(request, chosen) as second:
            second.write()
    with locked(request, chosen) as third:  # The first run has ended by now; its name is still taken.
        third.write()
    assert len({first.name, second.name, third.name}) == 3
    assert {first.attempt, second.attempt, third.attempt} == {1}


def test_a_named_run_is_read_again_under_its_lock(digits_recipe: Recipe, tmp_path: Path) -> None:
    request = Request(digits_recipe, "jobs/digits.py", tmp_path, local=True, name="x")
    chosen = choose_run(tmp_path, digits_recipe, "x", resume=False)
    with locked(request, chosen) as first:
        first.with_run_id("id").write()
    with locked(request, chosen) as second:
        assert (second.attempt, second.run_id) == (2, "id")
