"""Fixtures of the commands' tests."""

from __future__ import annotations

import importlib

import pytest


@pytest.fixture(autouse=True)
def process_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let main() return into the test: the limit on the end of a process would end pytest's own."""
    module = importlib.import_module("resnet_dist.cli.main")  # resnet_dist.cli.main itself is the function
    monkeypatch.setattr(module, "limit_exit", lambda seconds, code: None)
    monkeypatch.setattr(module, "exit_at_next_signal", lambda: None)  # nor may its signals keep our handlers
