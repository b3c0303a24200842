"""The changes that a resumed run may make, and the lock that allows one attempt at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.config import Recipe, load_recipe
from resnet_dist.config.part import fields
from resnet_dist.driver.hold import locked
from resnet_dist.driver.request import Request
from resnet_dist.errors import UserError
from resnet_dist.order.versions import NEWEST_VERSION
from resnet_dist.runs.choose import MAY_CHANGE, choose_run
from resnet_dist.runs.folder import RUN_FILE, RunFolder
from tests.paths import JOBS

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


def test_a_length_may_be_written_in_another_unit(digits_recipe: Recipe, tmp_path: Path) -> None:
    """The driver compares the steps, once it has the data: tests/driver/test_continued.py."""
    for key, value in (
        ("schedule.warmup", "10 percent"),
        ("train.ema_every", "1 epochs"),
        ("data.train_sizes", '[["0 steps", 8]]'),
    ):
        averaged = change(digits_recipe, "train.ema_decay", "0.9")
        choose_run(tmp_path, averaged, key, resume=False).write()
        assert choose_run(tmp_path, change(averaged, key, value), key, resume=True).attempt == 2


RECIPES_0_3_0: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "recipes-0.3.0.json").read_text()
)


@pytest.mark.parametrize("job", RECIPES_0_3_0)
def test_a_run_begun_with_0_3_0_is_continued_by_its_recipe(job: str, tmp_path: Path) -> None:
    """Fields that are newer than the run have the values that leave its curve as it was."""
    stored = RECIPES_0_3_0[job]
    recipe = Recipe.model_validate(stored)
    for key, value in recipe.flat().items():
        part, _, name = key.rpartition(".")
        if name not in (stored[part] if part else stored):
            owner = getattr(recipe, part) if part else recipe
            assert getattr(owner, name) == type(owner).model_fields[name].default, (key, value)
    run = choose_run(tmp_path, recipe, "x", resume=False)
    (tmp_path / "runs/x").mkdir(parents=True)
    text = json.dumps({"name": "x", "run_id": None, "attempt": 1, "recipe": stored, "key": run.key})
    (tmp_path / "runs/x" / RUN_FILE).write_text(text)
    again = load_recipe(tmp_path / "runs/x" / RUN_FILE)
    assert again == recipe
    assert choose_run(tmp_path, again, "x", resume=True).attempt == 2


@pytest.mark.parametrize("job", ["digits", "cifar10_resnet", "finetune", "imagenet_rn50"])
def test_jobs_that_draw_the_curve_of_0_3_0_continue_its_runs(job: str, tmp_path: Path) -> None:
    stored = Recipe.model_validate(RECIPES_0_3_0[job])
    choose_run(tmp_path, stored, "x", resume=False).write()
    assert choose_run(tmp_path, load_recipe(JOBS / f"{job}.py"), "x", resume=True).attempt == 2


@pytest.mark.parametrize(
    ("job", "named"),
    [
        ("imagenet_rn50_v2", "data.spread_repeats was false, is true"),
        ("imagenet_rn50_a3", "data.policy_magnitude was 6, is 18"),
        ("imagenet_rn50_fast", "optim.decay_biases was false, is true"),
        ("cifar10_fast", "train.length was 9.9 epochs, is 476 steps"),
    ],
)
def test_jobs_that_came_closer_to_their_source_name_what_changed(
    job: str, named: str, tmp_path: Path
) -> None:
    stored = Recipe.model_validate(RECIPES_0_3_0[job])
    choose_run(tmp_path, stored, "x", resume=False).write()
    with pytest.raises(UserError, match=f"{named}.* or the same recipe: .*runs/x/run.json in place of"):
        choose_run(tmp_path, load_recipe(JOBS / f"{job}.py"), "x", resume=True)


def test_a_run_keeps_the_order_that_it_began_with(
    digits_recipe: Recipe, started: RunFolder, tmp_path: Path
) -> None:
    """A run of 0.3.0 recorded no version, and had the first."""
    assert started.order == NEWEST_VERSION == 2
    assert choose_run(tmp_path, digits_recipe, "x", resume=True).order == 2
    file = Path(started.location) / RUN_FILE
    record = json.loads(file.read_text())
    assert record.pop("order") == 2
    file.write_text(json.dumps(record))
    for _ in range(2):
        run = choose_run(tmp_path, digits_recipe, "x", resume=True)
        assert run.order == 1
        run.write()
    assert json.loads(file.read_text())["order"] == 1


def test_an_order_of_a_later_version_is_refused(
    digits_recipe: Recipe, started: RunFolder, tmp_path: Path
) -> None:
    replace(started, order=3).write()
    expected = (
        r"run.json: the run has version 3 of the order of samples, this resnet_dist has 1 and 2; continue it"
    )
    with pytest.raises(UserError, match=expected):
        choose_run(tmp_path, digits_recipe, "x", resume=True)
