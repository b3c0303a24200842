"""Kill training at random instants and compare, as tests/benchmarks/kills.py does, with few kills."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.kills import OVERRIDES, Setup, _kill_one, kill_and_compare


def test_a_kill_that_comes_too_late_is_none() -> None:
    """The process ends after it was seen alive, and before the kill."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    # Wait for its end in a way that Popen does not notice.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert _kill_one(process, random.Random(0)) is None


@pytest.mark.long
@pytest.mark.timeout(900)
def test_kill_9_at_random_instants_cannot_be_seen_afterwards(tmp_path: Path) -> None:
    setup = Setup(tmp_path, "local", 1, {**OVERRIDES, "model.name": "resnet8"})
    kills, differences = kill_and_compare(setup, kills=3, seed=1, report=False)
    assert len(kills) == 3
    assert all(kill.exit_code == -9 for kill in kills)
    assert differences == []
