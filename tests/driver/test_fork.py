"""A fork begins with the checkpoint of another run, on the same samples; a recipe that cannot take it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_dist.config import Recipe
from resnet_dist.data.shards.index import Index, read_index
from resnet_dist.driver.fork import check_fork, find_origin
from resnet_dist.driver.request import Request, Summary
from resnet_dist.driver.run import run_training
from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RunFolder, checkpoint_name, read_run, stored_recipe
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.console import ConsolePublisher
from resnet_dist.tracking.spool import Follower
from resnet_dist.train.checkpoint.folder import list_checkpoints, write_checkpoint
from tests.reporter import RecordingReporter
from tests.train.runs import final_tensors

SHORT = [
    "train.length=8 steps",
    "train.checkpoint_every=4 steps",
    "train.eval_every=0 steps",
    "train.log_every=1 steps",
]


@pytest.fixture(autouse=True)
def without_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resnet_dist.tracking.locate.has_mlflow", lambda: False)


def trained(recipe: Recipe, output: Path, name: str, begin_from: str | None = None) -> Summary:
    request = Request(recipe, "digits.py", output, local=True, gpu=False, name=name, begin_from=begin_from)
    return run_training(
        request, RecordingReporter(), lambda record, on_entry: ConsolePublisher(record.run.spool, on_entry)
    )


def test_a_fork_continues_the_curve(digits_recipe: Recipe, tmp_path: Path) -> None:
    """With the same recipe it ends with the same weights and optimizer, to the bit; with another rate it does not."""
    recipe = digits_recipe.with_overrides([*SHORT, "train.ema_decay=0.9", "train.best_metric=eval/top1"])
    trained(recipe, tmp_path, "a")
    same = trained(recipe, tmp_path, "b", "a@4")
    assert same.outcome.step == 8
    ours, theirs = final_tensors(tmp_path / "runs/b"), final_tensors(tmp_path / "runs/a")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    steps = [entry.step for entry in Follower(same.run.spool).read() if entry.metrics]
    assert min(steps) == 5
    recorded = read_run(open_storage(tmp_path / "runs/b"))
    assert recorded is not None
    assert str(recorded.lineage) == "step 4 of run a"
    other = recipe.with_overrides(["optim.lr=0.05", "train.length=10 steps", "train.ema_decay=none"])
    assert trained(other, tmp_path, "c", str(tmp_path / "runs/a")).outcome.step == 10
    # The same command again continues the fork, also where the other run has gone on or was removed.
    with pytest.raises(UserError, match="run b exists, and began with step 4 of run a; give a new --name"):
        trained(recipe, tmp_path, "b", "a@8")
    open_storage(tmp_path / "runs/a").delete_all()
    assert trained(recipe, tmp_path, "b", "a@4").outcome.step == 8


@pytest.fixture
def origin(digits_recipe: Recipe, tmp_path: Path) -> RunFolder:
    """Return a run with checkpoints of steps 4 and 8, which nothing is read of."""
    recipe, index = digits_recipe.with_overrides(SHORT), read_index(digits_recipe.data.train)
    run = RunFolder(
        open_storage(tmp_path / "runs/a"), "a", "0123456789abcdef", 1, stored_recipe(recipe), key="a"
    )
    run = replace(run, data=(index.digest(), ""))
    run.write()
    run.checkpoints.write("unused", b"")
    for step in (4, 8):
        scalars = {"step": step, "optimizer": {"groups.0/step": step}}
        manifest = {"scalars": scalars, "recipe": {}, "classes": []}
        write_checkpoint(run.checkpoints, step, {"model": {"x": torch.zeros(1)}}, manifest)
    assert list_checkpoints(run.checkpoints) == [checkpoint_name(4), checkpoint_name(8)]
    return run


def refused(
    recipe: Recipe, origin: RunFolder, overrides: list[str], begin_from: str, name: str = "new"
) -> None:
    output = Path(origin.location).parent.parent
    request = Request(recipe.with_overrides([*SHORT, *overrides]), "x.py", output, begin_from=begin_from)
    run = RunFolder(open_storage(output / "runs" / name), name, None, 1, {})
    found = find_origin(request, run)
    assert found is not None
    index: Index = read_index(recipe.data.train)
    check_fork(found, request.recipe, (index, index), 8)


@pytest.mark.parametrize(
    ("overrides", "begin_from", "message"),
    [
        (
            ["model.name=resnet20"],
            "a@4",
            "does not fit this recipe: model.name was resnet8, is resnet20; set the same",
        ),
        (
            ["data.global_batch_size=64", "seed=1"],
            "a@4",
            "seed was 0, is 1; data.global_batch_size was 128, is 64",
        ),
        (
            ["optim.optimizer=adamw"],
            "a@4",
            "optim.optimizer was sgd, is adamw.*--set model.init_from=/.*/runs/a",
        ),
        (["optim.decay_norms=true"], "a@4", "optim.decay_norms was false, is true"),
        (
            [],
            "a",
            "train.length='8 steps' is 8 steps, and the checkpoint of run a has taken 8; give a longer one",
        ),
        ([], "a@5", "/runs/a keeps the checkpoints of steps 4, 8"),
        ([], "a@", "--from a@: give a run, or RUN@STEP"),
        ([], "b", "--from b: no run named b in /.*/runs; "),
        ([], "./b", "--from ./b: ./b is no folder of a run"),
    ],
)
def test_what_cannot_be_forked_is_refused_by_name(
    digits_recipe: Recipe, origin: RunFolder, overrides: list[str], begin_from: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        refused(digits_recipe, origin, overrides, begin_from)


def test_other_shards_have_no_such_position(digits_recipe: Recipe, origin: RunFolder) -> None:
    replace(origin, data=("of other shards", "")).write()
    with pytest.raises(
        UserError, match="run a was trained on other shards than data.train=.* holds, so step 4"
    ):
        refused(digits_recipe, origin, [], "a@4")
