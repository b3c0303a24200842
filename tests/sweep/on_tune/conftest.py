"""The watch that the tests of Ray Tune's part share."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.sweep.watch import Watch


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch({}, "eval/top1", tmp_path / ".stop", lambda line: None, lambda name, outcome: None)
