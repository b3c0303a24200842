"""The kill test of tests/benchmarks/kills.py, with few kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from .benchmarks.kills import OVERRIDES, Setup, kill_and_compare


@pytest.mark.long
@pytest.mark.timeout(900)
def test_kill_9_at_random_instants_cannot_be_seen_afterwards(tmp_path: Path) -> None:
    setup = Setup(tmp_path, "local", 1, {**OVERRIDES, "model.name": "resnet8"})
    kills, differences = kill_and_compare(setup, kills=3, seed=1, report=False)
    assert len(kills) == 3
    assert all(kill.exit_code == -9 for kill in kills)
    assert differences == []
