"""A `predict` that is killed, in its own process, and started again: one row for each input."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.checkpoints import random_checkpoint

pytestmark = pytest.mark.long
COPIES = 60  # of the held-out digits: enough to be killed on the way
NUM_DIGITS = 360


def test_kill_9_and_the_same_command_leave_one_row_for_each_input(digits_data: Path, tmp_path: Path) -> None:
    folder, _ = random_checkpoint(tmp_path / "m", "model.name=resnet8", classes=tuple("0123456789"))
    shards = [str(digits_data / "eval")] * COPIES
    command = [sys.executable, "-m", "resnet_dist", "predict", str(folder), *shards, "--to", "rows.jsonl"]
    partial = tmp_path / "rows.jsonl.partial"
    for num_rows in (500, 5000):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while not partial.exists() or partial.read_bytes().count(b"\n") < num_rows:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert not (tmp_path / "rows.jsonl").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert (done.returncode, done.stdout) == (0, f"rows.jsonl: {COPIES * NUM_DIGITS:,} rows\n"), done.stderr
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    names = [line.partition('", ')[0] for line in lines]
    assert len(names) == COPIES * NUM_DIGITS
    assert names == names[:NUM_DIGITS] * COPIES
    assert len(set(names)) == NUM_DIGITS
