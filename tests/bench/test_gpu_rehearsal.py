"""Every part of the measurements on a GPU runs on a CPU at tiny sizes, where Ray, MLflow and webdataset are missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.bench.synthetic import write_noise
from tests.paths import ROOT

pytestmark = pytest.mark.long

PROGRAM = """
import runpy, sys
for name in ("ray", "mlflow", "webdataset", "sklearn", "typer", "rich", "matplotlib"):
    sys.modules[name] = None  # importing it now raises ImportError
sys.argv[0] = "tests.benchmarks.gpu"
runpy.run_module("tests.benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def rehearse(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    write_noise(folder / "cifar", 32, train=160, evaluation=40)
    write_noise(folder / "photographs", 80, train=24, evaluation=8)
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        "--rehearse",
        "--out",
        f"{folder}/out",
        "--work",
        f"{folder}/work",
    ]
    command += [f"--cifar={folder}/cifar", f"--photographs={folder}/photographs", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    return done, json.loads((folder / "out/results.json").read_text())


def test_every_part_is_rehearsed(tmp_path: Path) -> None:
    done, found = rehearse(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert found["rehearsal"] is True
    parts = found["parts"]
    assert list(parts) == ["exact", "repeat", "fast", "airbench", "imagenet", "resnet20", "resnet56"]
    assert parts["exact"]["resizing"] == {"equals_the_cpu": True}
    assert {parts["exact"][f"cache={kind}"]["equals_the_cpu"] for kind in ("none", "ram", "device")} == {True}
    repeated = [one for name, one in parts["repeat"].items() if name.startswith("resnet20")]
    assert len(repeated) == 2
    assert all(one["same_bits"] and one["same_bits_resumed"] for one in repeated)  # as a CPU always does
    trained = ("cifar10_fast, compile=none", "cifar10_fast_muon, compile=none", "cifar10_fast, eager")
    for run in (*(parts["fast"][name] for name in trained), parts["airbench"]["airbench94"]):
        seconds = [run[f"{part}_seconds"] for part in ("whitening", "training", "evaluation")]
        assert run["n"] == 2
        assert min(seconds) > 0
        assert run["total_seconds_lowest"] <= run["total_seconds_median"] <= run["total_seconds_highest"]
        assert max(seconds) < run["total_seconds_highest"]
    for name in trained:
        evaluations = parts["fast"][f"{name}, evaluations of the last weights"]
        assert {"image alone", "mirrored", "averaged below 0.7"} <= set(evaluations)
    assert {"eager", "eager, not channels-last", "eager, EMA"} <= set(parts["imagenet"])
    assert parts["imagenet"]["eager, from shards, decode=cpu"]["n"] == 2
    for depth in (20, 56):
        assert parts[f"resnet{depth}"][f"resnet{depth}"]["finished"] is True


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fast,", "has an empty name"),
        ("", "has an empty name"),
        ("fast,,exact", "has an empty name"),
        ("fast,fats", "has 'fats', which is no part"),
        ("fast,fast", "is named twice"),
    ],
)
def test_parts_that_are_none_are_refused_with_all_names(
    text: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.benchmarks.gpu.__main__ import PARTS, parse

    monkeypatch.setattr(sys, "argv", ["gpu", "--parts", "fast, exact"])
    assert parse().parts == ["fast", "exact"]
    monkeypatch.setattr(sys, "argv", ["gpu", "--parts", text])
    with pytest.raises(SystemExit) as ended:
        parse()
    assert ended.value.code == 2
    assert f"argument --parts: {text!r} {reason}; use some of {','.join(PARTS)}" in capsys.readouterr().err


def test_a_part_that_takes_too_long_leaves_what_was_measured(tmp_path: Path) -> None:
    done, found = rehearse(tmp_path, "--parts", "exact,fast", "--minutes", "0.31")
    # 0.31 minutes leave half a second after the times to end and to write: the next part is left out.
    assert found["parts"]["exact"]["process"]["is_a_copy_of_one_that_imported"] is True
    assert found["parts"]["fast"] == {"left out": {"reason": "no time is left"}}
    assert done.returncode in (0, 1)
