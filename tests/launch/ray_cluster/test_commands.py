"""The commands refuse a wrong address first: exit code 2, before large imports, and with nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.ray_cluster.servers import free_port
from tests.paths import ROOT

PROGRAM = """
import sys
from resnet_dist.cli.main import run_command
code = run_command()
print(code, sorted({"torch", "ray", "mlflow"} & set(sys.modules)))
"""


def run(folder: Path, *words: str, program: str = PROGRAM, **variables: str) -> tuple[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=folder,
        env={**plain, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "job"),
    [("train", "jobs/digits.py"), ("submit", "jobs/digits.py"), ("study", "jobs/plain_vs_residual.py")],
)
@pytest.mark.parametrize("variable", ["", "RAY_ADDRESS"])
def test_a_wrong_address_is_refused_first(command: str, job: str, variable: str, tmp_path: Path) -> None:
    target = f"127.0.0.1:{free_port()}"
    words = [command, str(ROOT / job), *(("--workers", "2") if command == "study" else ())]
    variables = {variable: target} if variable else {}
    out, err = run(tmp_path, *words, *(() if variable else ("--address", target)), **variables)
    assert out == "2 []\n", err
    label = f"{variable}={target}" if variable else f"--address {target}"
    assert err.startswith(f"error: {label}: nothing listens on {target}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


SETTINGS = """
import os
from resnet_dist.launch.on_ray.settings import ignored_variables, set_defaults
set_defaults()
set_defaults()
print(ignored_variables(), os.environ["RAY_TRAIN_V2_ENABLED"])
"""


@pytest.mark.parametrize(
    ("value", "ignored"), [("0", "('RAY_TRAIN_V2_ENABLED=0',)"), ("true", "()"), ("", "()")]
)
def test_the_first_version_of_ray_train_is_never_used(value: str, ignored: str, tmp_path: Path) -> None:
    variables = {"RAY_TRAIN_V2_ENABLED": value} if value else {}
    out, err = run(tmp_path, program=SETTINGS, **variables)
    assert out == f"{ignored} 1\n", err
