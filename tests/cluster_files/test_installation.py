"""Installations for the tests of clusters: Debian's packages in CI, and checkers in environments of their own."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.cluster_files.checkers import environment_of
from tests.paths import ROOT


def test_ci_installs_what_it_can_and_asks_nothing(tmp_path: Path) -> None:
    (function,) = re.findall(r"^install\(\) \{.*?^\}", (ROOT / ".ci/run").read_text(), re.M | re.S)
    apt = 'apt-get() { echo "$DEBIAN_FRONTEND $*" >> "$1.log"; read -r && return 1; [[ $* != *missing* ]]; }'
    script = f"set -euo pipefail; cd {shlex.quote(str(tmp_path))}\n{apt}\n{function}\ninstall a missing b"
    done = subprocess.run(
        ["bash", "-c", script], input="y\n" * 3, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "install.log").read_text().splitlines()
    assert [line.split()[-1] for line in asked] == ["a", "missing", "b"]
    assert all(line.startswith("noninteractive ") and "--no-install-recommends" in line for line in asked)
    assert re.findall(r"(\w+) could not be installed", done.stdout) == ["missing"]


def test_checkers_keep_the_folders_of_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "UV_CACHE_DIR",
        "UV_PYTHON_INSTALL_DIR",
        "UV_CONFIG_FILE",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "UV_CONFIG_FILE" not in environment_of(tmp_path / "x")
    (tmp_path / ".config/uv").mkdir(parents=True)
    (tmp_path / ".config/uv/uv.toml").touch()
    found = environment_of(tmp_path / "x")
    assert found["HOME"] == str(tmp_path / "x")
    assert found["UV_CONFIG_FILE"] == str(tmp_path / ".config/uv/uv.toml")
    assert found["UV_PYTHON_INSTALL_DIR"] == str(tmp_path / ".local/share/uv/python")
