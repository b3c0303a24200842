"""The launcher of a process counts only where it started this very process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from unittest import mock

import pytest

from resnet_dist.system import command

TORCHRUN = dict.fromkeys(command.VARIABLES, "0") | {"TORCHELASTIC_RUN_ID": "x"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start from an empty environment without a terminal, and restore it after the test."""
    monkeypatch.setattr(os, "isatty", lambda number: False)
    with mock.patch.dict(os.environ, clear=True):
        yield


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0"}, ("srun", 2)),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "3"}, ("srun", 4)),
        # srun -n 1 in a job of two tasks
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, None),
        # a script of sbatch; an old salloc
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),
        # the shell of salloc as an interactive step
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "4294967290"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "4294967291"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, ("mpirun", 2)),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        ({"OMPI_COMM_WORLD_RANK": "0"}, None),
        ({"MV2_COMM_WORLD_SIZE": "3", "MV2_COMM_WORLD_RANK": "0"}, ("mpirun", 3)),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, ("mpirun", 2)),
        ({"PMI_RANK": "1"}, None),
        ({"PMI_SIZE": "two", "PMI_RANK": "1"}, None),
        ({"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "0"}, ("jsrun", 2)),
        ({"FLUX_JOB_SIZE": "2", "FLUX_TASK_RANK": "0"}, ("flux run", 2)),
        ({"HOROVOD_SIZE": "2", "HOROVOD_RANK": "0"}, ("horovodrun", 2)),
        ({"TF_CONFIG": "{}", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "AZUREML_RUN_ID": "x"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", **TORCHRUN}, None),
    ],
)
def test_task_launcher(variables: dict[str, str], launcher: tuple[str, int] | None) -> None:
    os.environ.update(variables)
    assert command.task_launcher() == launcher


def test_a_command_that_a_person_types_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ.update({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0"})
    monkeypatch.setattr(os, "isatty", lambda number: number == 0)
    assert command.task_launcher() is None


@pytest.mark.parametrize("variables", [{"LOCAL_RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}, {}])
def test_variables_of_no_launcher_are_dropped(variables: dict[str, str]) -> None:
    os.environ.update(
        variables | {"LOCAL_WORLD_SIZE": "many", "NODE_RANK": "1", "TORCHELASTIC_RUN_ID": "old"}
    )
    assert command.drop_stray_variables() == list(variables)
    assert not [name for name in os.environ if "RANK" in name or "WORLD" in name]
    assert command.is_main_process()


def test_variables_of_torchrun_stay() -> None:
    os.environ.update(TORCHRUN | {"RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert command.drop_stray_variables() == []
    assert (os.environ["LOCAL_WORLD_SIZE"], command.is_main_process()) == ("2", False)


@pytest.mark.parametrize(
    ("typed", "continues"),
    [
        ("resnet-dist train a.py", "resnet-dist train a.py --name first"),
        ("resnet-dist train a.py --name old --resume", "resnet-dist train a.py --name first"),
        ("resnet-dist submit a.py --name=old --detach", "resnet-dist submit a.py --detach --name first"),
        ("resnet-dist study a.py --name mine", "resnet-dist study a.py --name mine"),
    ],
)
def test_the_command_that_continues_a_run(typed: str, continues: str) -> None:
    assert " ".join(command.named(typed.split(), "first")) == continues


@pytest.mark.parametrize(
    "value",
    [
        "https://anna:hush@h/index.json",
        "pipe:curl -u 'anna:hush hush' https://h/a.tar",
        "pipe:curl -u anna:'hush hush' https://h/a.tar",
        "pipe:TOKEN='hush hush' get a.tar",
    ],
)
def test_a_command_that_is_shown_has_no_password_whatever_quotes_it_gets(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quotes around a word change those inside it, so a password must be hidden before."""
    monkeypatch.setattr(sys, "argv", ["resnet-dist", "train", "a.py", "--set", f"data.train={value}"])
    for line in (command.command_line(), command.resume_advice("first")):
        assert "hush" not in line
        assert "***" in line
        assert line.endswith("\n  (*** hides a password that no file keeps: type it again in its place)")
    assert "hush" in command.typed_line()


def test_a_command_without_a_password_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["resnet-dist", "train", "a.py", "--set", "data.train=https://h/a b"])
    assert command.command_line() == "resnet-dist train a.py --set 'data.train=https://h/a b'"
