"""The tags that say where a run comes from."""

from __future__ import annotations

import getpass

import pytest

from resnet_dist.tracking.origin import origin_tags


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert origin_tags("jobs/digits.py", "")["mlflow.user"].startswith("uid ")


def test_a_description_loses_its_passwords() -> None:
    assert origin_tags("x.py", "from http://anna:hush@host ")["mlflow.note.content"] == "from http://***@host"
