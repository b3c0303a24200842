"""Wrong values of variables are removed with a line or refused with a sentence; right ones stay."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from resnet_dist.errors import UserError
from resnet_dist.system.environment import variables
from tests.paths import ROOT


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("OMP_NUM_THREADS", "0", "no positive number"),
        ("OMP_NUM_THREADS", "abc", "no positive number"),
        ("OMP_NUM_THREADS", "-1", "no positive number"),
        ("OMP_NUM_THREADS", "4,", "no positive number"),
        ("MKL_NUM_THREADS", "auto", "no positive number"),
        ("TORCH_CPP_LOG_LEVEL", "debug", "none of INFO, WARNING, ERROR, FATAL"),
        ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "abc", "no number"),
        ("RAY_gcs_server_request_timeout_seconds", "10s", "no number"),
        ("RAY_LOG_MONITOR_MAX_OPEN_FILES", "", ""),
    ],
)
def test_a_wrong_value_is_removed(name: str, value: str, wrong: str) -> None:
    os.environ[name] = value
    expected = [f"ignored: {name}={value}, which is {wrong}"] if wrong else []
    assert [line for line in variables.remove_wrong_values() if name in line] == expected
    assert name not in os.environ


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OMP_NUM_THREADS", "4"),
        ("OMP_NUM_THREADS", "4,2"),
        ("OMP_NUM_THREADS", " 4 "),
        ("TORCH_CPP_LOG_LEVEL", "ERROR"),
        ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60.5"),
        ("RAY_ADDRESS", "abc"),
        ("RAY_DEDUP_LOGS", "0"),
        ("RAY_TMPDIR", "/tmp"),
    ],
)
def test_a_right_value_stays(name: str, value: str) -> None:
    os.environ[name] = value
    assert variables.remove_wrong_values() == []
    assert os.environ[name] == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TORCH_DISTRIBUTED_DEBUG", "YES"),
        ("TORCH_DISTRIBUTED_DEBUG", "1"),
        ("PYTORCH_ALLOC_CONF", "abc"),
        ("PYTORCH_CUDA_ALLOC_CONF", "512"),
    ],
)
def test_what_torch_dies_of_is_refused(name: str, value: str) -> None:
    os.environ[name] = value
    with pytest.raises(UserError, match=f"{name}={value}: torch accepts .*unset it"):
        variables.refuse_wrong_values()


def test_what_torch_accepts_stays() -> None:
    right = {"TORCH_DISTRIBUTED_DEBUG": "detail", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    os.environ.update(right)
    assert variables.refuse_wrong_values() == []
    assert {name: os.environ[name] for name in right} == right
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = ""  # Torch dies of it, and it means nothing.
    assert variables.refuse_wrong_values() == []
    assert "TORCH_DISTRIBUTED_DEBUG" not in os.environ


def test_warnings_are_no_errors_for_a_command() -> None:
    os.environ["PYTHONWARNINGS"] = "error,ignore::DeprecationWarning,error::UserWarning"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variables.forgive_warnings()
        assert "error" not in {entry[0] for entry in warnings.filters}
    assert os.environ["PYTHONWARNINGS"] == "ignore::DeprecationWarning"


def test_warnings_as_errors_of_a_program_stay() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variables.forgive_warnings()
        assert "error" in {entry[0] for entry in warnings.filters}


@pytest.mark.parametrize(
    ("value", "visible"),
    [
        ("0", 1),
        ("0,1", 2),
        ("1", 1),
        ("", 0),
        ("-1", 0),
        ("7", 0),
        ("abc", 0),
        ("1,7,0", 1),
        (" 1, 0", 2),
        ("GPU-8932f937", 1),
        ("MIG-GPU-1/2/3", 1),
        ("NoDevFiles", 0),
    ],
)
def test_visible_gpus(value: str, visible: int) -> None:
    assert variables.visible_gpus(value, 2) == visible


def test_gpus_that_a_variable_hides_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert variables.num_gpus(tmp_path) == 2
    assert variables.num_gpus(tmp_path / "gone") == 0
    monkeypatch.setattr(variables, "num_gpus", lambda: 2)
    assert variables.report_hidden_gpus(gpu=None) == []
    os.environ["CUDA_VISIBLE_DEVICES"] = "7"
    hidden = "CUDA_VISIBLE_DEVICES='7' hides this machine's 2 GPU(s)"
    assert variables.report_hidden_gpus(gpu=None) == [f"{hidden}: training on the CPU"]
    assert variables.report_hidden_gpus(gpu=False) == []
    with pytest.raises(UserError) as caught:
        variables.report_hidden_gpus(gpu=True)
    assert str(caught.value) == f"--gpu: {hidden}; set it to numbers from 0 to 1, or unset it, or use --cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    assert variables.report_hidden_gpus(gpu=True) == []
    monkeypatch.setattr(variables, "num_gpus", lambda: 0)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    assert variables.report_hidden_gpus(gpu=None) == []


def test_a_command_reports_and_refuses(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "resnet_dist", "train", "gone.py", "--local"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "0", "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first == "ignored: OMP_NUM_THREADS=0, which is no positive number"
    assert "gone.py: no such recipe file" in second
