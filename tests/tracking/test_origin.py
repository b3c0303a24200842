"""The tags that say where a run comes from."""

from __future__ import annotations

import getpass
import json

import pytest

from resnet_dist.config import Recipe
from resnet_dist.system.provenance import (
    CHANGES_VARIABLE,
    GIT_BRANCH_VARIABLE,
    GIT_COMMIT_VARIABLE,
    GitState,
)
from resnet_dist.tracking.origin import (
    NO_DIFF_TAG,
    changes_text,
    origin_tags,
    recipe_tags,
    tags_of_origin,
)


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert origin_tags("jobs/digits.py", "")["mlflow.user"].startswith("uid ")


def test_a_description_loses_its_passwords() -> None:
    assert origin_tags("x.py", "from http://anna:hush@host ")["mlflow.note.content"] == "from http://***@host"


def test_the_changes_of_a_command_are_named_without_passwords(digits_recipe: Recipe) -> None:
    changed = digits_recipe.with_overrides(["optim.lr=0.2", "data.eval=https://anna:hush@host/eval"])
    text = changes_text(changed, digits_recipe)
    assert text == (
        f"data.eval=https://***@host/eval (was {digits_recipe.data.eval}), optim.lr=0.2 (was 0.1)"
    )
    tags = recipe_tags(changed, text)
    assert tags["resnet_dist.changes_from_file"] == text
    assert "optim.lr=0.2" in tags["resnet_dist.not_default"]
    assert "optim.momentum" not in tags["resnet_dist.not_default"]
    assert "hush" not in str(tags)
    assert "resnet_dist.changes_from_file" not in recipe_tags(digits_recipe, "")


def test_a_submitted_job_has_the_origin_that_submit_has_seen(
    digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"metadata": {"job_submission_id": "raysubmit_1"}, "runtime_env": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    monkeypatch.setenv(GIT_COMMIT_VARIABLE, "abc-dirty")
    monkeypatch.setenv(GIT_BRANCH_VARIABLE, "main")
    monkeypatch.setenv(CHANGES_VARIABLE, "optim.lr=0.2 (was 0.1)")
    tags = origin_tags("recipe.json", "")
    assert tags["resnet_dist.ray_job"] == "raysubmit_1"
    assert (tags["mlflow.source.git.branch"], tags["resnet_dist.git_dirty"]) == ("main", "true")
    assert recipe_tags(digits_recipe, "")["resnet_dist.changes_from_file"] == "optim.lr=0.2 (was 0.1)"


def test_missing_changes_are_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GIT_COMMIT_VARIABLE, raising=False)
    for state, expected in (
        (GitState("abc-dirty", no_diff="not read"), "not read"),
        (GitState("abc-unchecked", no_diff="not read"), "not read"),
        (GitState("abc-dirty", diff="+1"), None),
        (GitState("abc", no_diff="a submitted job has none"), None),
    ):
        assert tags_of_origin("x.py", "", state).get(NO_DIFF_TAG) == expected
    monkeypatch.setenv(GIT_COMMIT_VARIABLE, "abc-dirty")
    tags = origin_tags("x.py", "")
    assert tags[NO_DIFF_TAG] == "a submitted job has none"
