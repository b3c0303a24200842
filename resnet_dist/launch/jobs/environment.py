"""The variables that a person gives a job with `--env`. Ray keeps them, and answers whoever asks the cluster for them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from resnet_dist.errors import UserError
from resnet_dist.system.command import COMMAND_VARIABLE
from resnet_dist.system.provenance import (
    CHANGES_VARIABLE,
    GIT_BRANCH_VARIABLE,
    GIT_COMMIT_VARIABLE,
    SOURCE_VARIABLE,
    USER_VARIABLE,
)
from resnet_dist.system.redact import redact

OPTION = "--env"
STOP_SIGNAL_VARIABLE, STOP_SECONDS_VARIABLE = "RAY_JOB_STOP_SIGNAL", "RAY_JOB_STOP_WAIT_TIME_S"
# `submit` sets these: another value would break `stop`, or the line that continues a run.
OWN = (
    COMMAND_VARIABLE,
    SOURCE_VARIABLE,
    USER_VARIABLE,
    GIT_COMMIT_VARIABLE,
    GIT_BRANCH_VARIABLE,
    CHANGES_VARIABLE,
    STOP_SIGNAL_VARIABLE,
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(
    r"PASSW|PASSPHRASE|TOKEN|SECRET|CREDENTIAL|(^|_)(API|ACCESS|PRIVATE|AUTH|ACCOUNT|STORAGE)?_?(KEY|PWD|PASS|PAT|AUTH)$",
    re.IGNORECASE,
)


def parse_variables(texts: Sequence[str]) -> dict[str, str]:
    """Return the variables of `--env KEY=VALUE`, or `--env KEY` for the value in this shell.

    Raises UserError, which never has a value, where one cannot be used.
    """
    variables = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not _NAME.fullmatch(name):
            shown = name if len(name) < len(text) else "…"
            raise UserError(
                f"{OPTION} {shown}{'=…' if mark else ''}: a variable is KEY=VALUE, or KEY alone for its value in this "
                "shell; KEY has letters, digits and _"
            )
        if name in OWN:
            raise UserError(f"{OPTION} {name}: submit sets this variable itself; leave it out")
        if not mark:
            if name not in os.environ:
                raise UserError(
                    f"{OPTION} {name}: it is not set in this shell; export it, or write {name}=VALUE"
                )
            value = os.environ[name]
        if "\0" in value:
            raise UserError(f"{OPTION} {name}: the value of a variable has no zero byte")
        variables[name] = value
    return variables


def is_secret(name: str, value: str) -> bool:
    """Report whether a variable looks like a secret, by its name or because its value is a URL with a password."""
    return bool(value) and (_SECRET.search(name) is not None or redact(value) != value)


def secrets_warning(variables: Mapping[str, str]) -> str:
    """Return the warning about variables that look like secrets; empty where there are none."""
    names = [name for name, value in variables.items() if is_secret(name, value)]
    if not names:
        return ""
    return (
        f"{OPTION} {', '.join(names)}: Ray stores the variables of a job, and sends them to everyone who may ask the "
        "cluster for its jobs; a secret is safer in the environment of `ray start`, or in a file on the nodes"
    )


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return a command without the secrets of its `--env KEY=VALUE`: `--env KEY` takes them from the shell again."""
    shown, is_value = [], False
    for word in words:
        prefix = f"{OPTION}=" if word.startswith(f"{OPTION}=") else ""
        name, mark, value = word.removeprefix(prefix).partition("=")
        hide = (is_value or prefix) and mark and is_secret(name, value)
        shown.append(f"{prefix}{name}" if hide else word)
        is_value = word == OPTION
    return shown
