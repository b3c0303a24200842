"""The process of trials: on a node that shares the folder, with the origin of the driver. No Ray is started."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from resnet_dist.config import Recipe
from resnet_dist.driver.request import Request
from resnet_dist.sweep.on_tune import actor as actor_module
from resnet_dist.sweep.on_tune.actor import SIGN_PREFIX, TrialActor, orders_of, shown_to_nodes
from resnet_dist.system.provenance import (
    GIT_BRANCH_VARIABLE,
    GIT_COMMIT_VARIABLE,
    SOURCE_VARIABLE,
    USER_VARIABLE,
    git_state,
    user_name,
)
from tests.paths import ROOT


@pytest.fixture
def actor(digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrialActor]:
    """The process of a trial on the node "a", set up by a driver on the node "b"."""
    node = {"id": "b"}
    context = SimpleNamespace(get_node_id=lambda: node["id"])
    monkeypatch.setattr(actor_module.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(actor_module, "run_training", lambda *arguments: pytest.fail("trained"))
    for name in (SOURCE_VARIABLE, USER_VARIABLE, GIT_COMMIT_VARIABLE, GIT_BRANCH_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    request = Request(digits_recipe, str(ROOT / "jobs/digits.py"), tmp_path)
    sign = tmp_path / f"{SIGN_PREFIX}x"
    orders = orders_of({"s-001": request}, "eval/top1", tmp_path / ".stop", sign)
    node["id"] = "a"
    found = TrialActor.__new__(TrialActor)
    found.setup({"trial": "s-001"}, **orders)
    yield found
    for name in set(os.environ) - set(before):
        del os.environ[name]


def test_a_trial_begins_with_its_first_step(actor: TrialActor, tmp_path: Path) -> None:
    assert actor._trial is None  # Tune has not reported its start yet.
    (tmp_path / ".stop").touch()
    assert actor.step() == {"done": True}
    assert actor._trial is None


def test_a_node_that_does_not_share_the_output_is_named(actor: TrialActor, tmp_path: Path) -> None:
    outcome = actor.step()["outcome"]
    assert outcome["state"] == "failed"
    assert outcome["reason"] == (
        f"{platform.node()} does not share {tmp_path} with the driver; --output must be a folder that all nodes share"
    )
    assert actor.reset_config({"trial": "s-001"})
    left = tmp_path / f"{SIGN_PREFIX}of-a-command-that-was-killed"
    left.touch()
    with shown_to_nodes(tmp_path / f"{SIGN_PREFIX}x"):
        assert not left.exists()
        assert actor.step()["outcome"]["reason"].startswith("Failed: trained")
    assert not list(tmp_path.glob(f"{SIGN_PREFIX}*"))


def test_another_node_gets_the_origin_of_the_driver(actor: TrialActor) -> None:
    assert os.environ[SOURCE_VARIABLE] == str(ROOT / "jobs/digits.py")
    assert os.environ[USER_VARIABLE] == user_name()
    state = git_state(ROOT)
    assert os.environ.get(GIT_COMMIT_VARIABLE) == (None if state is None else state.commit)
