"""A submitted job finds the Python of its cluster, and takes no credentials and no relative path along."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from resnet_dist import __version__
from resnet_dist.config import Recipe, WorkerRange
from resnet_dist.driver.preflight import absolute_paths
from resnet_dist.launch.jobs.submission import Submission, entrypoint, job_environment
from resnet_dist.launch.ray_cluster.job import (
    RECIPE_FILE,
    START_FILE,
    credentials_left_out,
    start_command,
    start_file_text,
)
from tests.paths import ROOT


def run_job(
    folder: Path, arguments: list[str], *, python: str = "", version: str = __version__
) -> tuple[int, str]:
    """Run the command of a job below a process with the command line of a raylet; return exit code and output.

    python: as the raylet names it; empty: there is no raylet. PATH has no Python.
    """
    start = folder / START_FILE
    start.parent.mkdir(exist_ok=True)
    start.write_text(start_file_text())
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("sh", "sed", "tr", "tail", "uname"):
        if not (tools / name).exists():
            (tools / name).symlink_to(
                f"/usr/bin/{name}" if Path(f"/usr/bin/{name}").exists() else f"/bin/{name}"
            )
    command = start_command(arguments)
    command[2] = version
    # The last command is not the only one: the shell stays as the parent.
    line = f"{shlex.join(command)}; exit $?"
    above = (
        ["--num_prestart_python_workers=2", f"--python_worker_command={python} worker.py"] if python else []
    )
    done = subprocess.run(
        ["/bin/sh", "-c", line, *above],
        cwd=folder,
        env={"PATH": str(tools), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_job_runs_the_python_of_the_cluster(tmp_path: Path) -> None:
    code, output = run_job(tmp_path, ["train", "--help"], python=sys.executable)
    assert code == 0, output
    assert "Usage: python -m resnet_dist train" in output
    assert "note:" not in output
    code, output = run_job(tmp_path, ["no-such-command"], python=sys.executable, version="9.9.9")
    assert code == 2
    assert f"note: this cluster has resnet_dist {__version__}, the machine that submits has 9.9.9" in output


def test_a_cluster_without_the_package_is_reported_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "resnet_dist.py").write_text("raise ModuleNotFoundError(\"No module named 'resnet_dist'\")")
    code, output = run_job(tmp_path, ["train", RECIPE_FILE], python=sys.executable)
    assert code == 2
    assert output.startswith(
        "error: the nodes of this cluster do not have resnet_dist (ModuleNotFoundError: No module named 'resnet_dist'"
    )
    assert f"install version {__version__} there" in output
    assert output.count("\n") == 1


def test_a_cluster_without_python_on_its_path(tmp_path: Path) -> None:
    code, output = run_job(tmp_path, ["train", RECIPE_FILE])
    assert (code, output.count("\n")) == (2, 1)
    assert "has no python on its PATH" in output


@pytest.fixture
def submission(digits_recipe: Recipe) -> Submission:
    source = Path("jobs/digits.py")
    return Submission(
        digits_recipe, source, "x", WorkerRange.exactly(2), None, None, False, "/o", False, "typed", 10, None
    )


def test_the_job_registers_its_model(submission: Submission) -> None:
    assert "--register" not in " ".join(entrypoint(submission))
    words = " ".join(entrypoint(replace(submission, register="my pets@best")))
    assert "--register" in words
    assert "my pets@best" in words


@pytest.mark.parametrize(
    ("variables", "named", "uri"),
    [
        (
            {"MLFLOW_TRACKING_PASSWORD": "hush", "MLFLOW_TRACKING_USERNAME": "anna"},
            "USERNAME, MLFLOW_TRACKING_PASSWORD",
            None,
        ),
        ({"MLFLOW_TRACKING_TOKEN": "hush"}, "MLFLOW_TRACKING_TOKEN", None),
        (
            {"MLFLOW_TRACKING_URI": "http://anna:hush@h:5000/a"},
            "user and password of MLFLOW_TRACKING_URI",
            "http://h:5000/a",
        ),
        (
            {"MLFLOW_TRACKING_URI": "postgresql://anna:hu@sh@h/db"},
            "user and password of MLFLOW_TRACKING_URI",
            "postgresql://h/db",
        ),
        ({"MLFLOW_TRACKING_URI": "http://h:5000"}, "", "http://h:5000"),
    ],
)
def test_credentials_stay_here_and_are_named(
    variables: dict[str, str],
    named: str,
    uri: str | None,
    submission: Submission,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    note = credentials_left_out()
    assert (named in note) if named else note == ""
    environment = job_environment(submission)
    assert environment.get("MLFLOW_TRACKING_URI") == uri
    assert not [
        text for text in (note, str(environment)) if "hush" in text or "anna" in text or "hu@sh" in text
    ]


def test_relative_paths_become_absolute_ones(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()

    def sent(**fields: str) -> Recipe:
        changes = [f"{name.replace('__', '.')}={value}" for name, value in fields.items()]
        return absolute_paths(digits_recipe.with_overrides(changes))

    recipe = sent(
        data__train="mine/train", data__eval="{output}/eval", data__source="images", data__shard_cache="~/c"
    )
    assert recipe.data.train == f"{tmp_path}/mine/train"
    assert recipe.data.eval == "{output}/eval"
    assert recipe.data.source == f"{tmp_path}/images"
    assert recipe.data.shard_cache == "~/c"
    recipe = sent(
        data__train="s3://bucket/train",
        data__source="digits",
        model__init_from="run/weights",
        data__shard_cache="c",
    )
    assert (recipe.data.train, recipe.data.source) == ("s3://bucket/train", "digits")
    assert recipe.model.init_from == f"{tmp_path}/run/weights"
    assert recipe.data.shard_cache == f"{tmp_path}/c"


def test_the_start_file_is_part_of_the_package() -> None:
    assert start_file_text().startswith("# Start this package")
