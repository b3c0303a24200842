"""The files in cluster/, read and edited, and the command lines in them, parsed by the real command line."""

from __future__ import annotations

import re
import shlex
import tomllib
from typing import Any

import typer
import yaml

from resnet_dist.cli import app
from tests.paths import ROOT

CLUSTER = ROOT / "cluster"
RAY = re.compile(r'"ray==([\d.]+)"')


def text_of(name: str) -> str:
    return (CLUSTER / name).read_text()


def load(name: str) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load(text_of(name))
    return value


def edited(name: str, old: str, new: str) -> str:
    """Return the text of a file with the first `old` replaced."""
    text = text_of(name)
    assert old in text, f"{name} has no {old!r}"
    return text.replace(old, new, 1)


def project_version() -> str:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def ray_version() -> str:
    """Return the version of Ray that is tested."""
    (version,) = RAY.findall((ROOT / "pyproject.toml").read_text())
    return str(version)


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile, each as its name and the rest of it."""
    text = re.sub(r"\\\n", " ", text_of("Dockerfile"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def interpolated(text: str, values: dict[str, str]) -> str:
    """Return a compose file as Docker reads it, with its variables replaced. Raises KeyError for one without a value."""

    def value(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        return values[name] if name in values or default is None else default

    pattern = r"(?<!\$)\$\{(?P<name>\w+)(?::-(?P<default>[^}]*)|:\?[^}]*)?\}"
    return re.sub(pattern, value, text).replace("$$", "$")


def parse_command(line: str) -> dict[str, Any]:
    """Parse a `resnet-dist train …` or `submit …` line with the real command line, and return the parameters."""
    program, command, *words = shlex.split(line)
    assert program == "resnet-dist"
    assert command in ("train", "submit")
    group = typer.main.get_command(app)
    return dict(group.commands[command].make_context(command, words).params)  # type: ignore[attr-defined]


def commands_in(name: str, program: str) -> list[str]:
    """Return the commands in a file's comments that begin with `program`."""
    lines = re.findall(r"^#   (.*)$", text_of(name), re.M)
    return [line.split("   ")[0].strip() for line in lines if line.startswith(f"{program} ")]
