"""The row of a fault is made in one place, from the run that went through it and the undisturbed one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.open import open_storage
from tests.cluster.fault_table import TABLE_VARIABLE, FaultTable
from tests.cluster.results import Result


def test_a_row_has_what_differs_from_the_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table.md"
    monkeypatch.setenv(TABLE_VARIABLE, str(file))
    whole = Result("FINISHED", {"loss": [(1, 0.5), (2, 0.25), (3, 0.2)]}, "w")
    found = replace(whole, points={"loss": [(1, 0.5), (2, 0.3), (2, 0.3)]})
    run = RunFolder(open_storage(tmp_path / "x"), "x", None, 2, {})
    table = FaultTable(nullcontext)
    row = table.add("kill", run, found, whole, next_step_seconds=4.0, exit_codes=[137, 0])
    assert (row.attempts, row.lost, row.doubled) == (2, 1, 1)
    assert row.difference == pytest.approx(0.2)
    line = "kill | 4.0 | – | 137, then 0 | FINISHED | 2 | 1 | 1 | 0.2"
    assert capsys.readouterr().out == f"\n{line}\n"
    assert file.read_text().endswith(f"\n| {line} |\n")
