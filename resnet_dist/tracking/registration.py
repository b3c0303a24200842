"""The name and the alias under which a command registers a model in MLflow. Knows no MLflow."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from resnet_dist.errors import UserError

FLAG = "--register"
FORM = "use NAME or NAME@ALIAS, such as pets@best"
MAX_NAME = 256  # characters; a column of MLflow's
MAX_ALIAS = 255
_ALIAS = re.compile(r"[A-Za-z0-9_-]+")
_RESERVED = re.compile(r"latest|v\d+", re.IGNORECASE)  # MLflow keeps these aliases for itself.


@dataclass(frozen=True)
class Registration:
    """A name in the registry, and the alias that its newest version gets; without one no alias is set."""

    name: str
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the registration of NAME or NAME@ALIAS. Raises UserError where MLflow would not take it."""
        name, at, alias = text.partition("@")
        if problem := _problem_of_name(name) or (_problem_of_alias(alias) if at else ""):
            raise UserError(f"{FLAG} {text[:300]!r}: {problem}; {FORM}")
        return cls(name, alias if at else None)

    def __str__(self) -> str:
        return self.name if self.alias is None else f"{self.name}@{self.alias}"


def _problem_of_name(name: str) -> str:
    if not name.strip():
        return "the name is empty"
    if name != name.strip():
        return "the name has spaces around it"
    if name in (".", "..") or any(letter in "/:" or not letter.isprintable() for letter in name):
        return "a name is no path, and has no '/', ':' or line break"
    if len(name) > MAX_NAME:
        return f"the name has {len(name)} characters, and MLflow takes {MAX_NAME}"
    return ""


def _problem_of_alias(alias: str) -> str:
    if not _ALIAS.fullmatch(alias) or len(alias) > MAX_ALIAS:
        return f"the alias {alias[:80]!r} must be letters, digits, '-' and '_'"
    if _RESERVED.fullmatch(alias):
        return f"MLflow keeps the alias {alias!r} for itself"
    return ""
