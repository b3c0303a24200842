"""What every part of a recipe is: frozen, strict, and explained in one sentence where it is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # of a run: a folder, and a word on the command line


class Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, coerce_numbers_to_str=True
    )


def explain(error: ValidationError, root: type[Part]) -> str:
    """One sentence for the first problem of a validation error."""
    details = error.errors(include_url=False)[0]
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return _explain_one(details, root) + more


def _explain_one(details: ErrorDetails, root: type[Part]) -> str:
    key = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        return f"{key} is not a field of the recipe{nearest(key, root)}"
    message = details["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if details["type"] == "missing":
        return f"{key} is missing: it has no default"
    if isinstance(details["input"], dict) or not key:
        return f"{key}: {message}" if key else message
    return f"{key}={details['input']!r}: {message}"


def nearest(key: str, root: type[Part]) -> str:
    known = [name for name, _ in fields(root)]
    by_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = by_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:  # a misspelt last word: compare it with last words
        leaf = {name.rpartition(".")[2]: name for name in known}
        near = [leaf[word] for word in difflib.get_close_matches(key.rpartition(".")[2], leaf, n=1)]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known are {', '.join(known)}"


def fields(part: type[Part], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in part.model_fields.items():
        kind: Any = field.annotation
        if get_origin(kind) in (Union, UnionType):
            kind = next(arg for arg in get_args(kind) if arg is not type(None))
        if isinstance(kind, type) and issubclass(kind, Part):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def refuse_unread(part: Part, choice: str, readers: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ValueError for a field that is set although `choice` has a value that does not read it.

    Off (0, False, None, empty) and the default are no settings: recipes travel as JSON, with every field in it.
    """
    chosen = getattr(part, choice)
    for name, choices in readers.items():
        value = getattr(part, name)
        if chosen not in choices and value and value != type(part).model_fields[name].default:
            raise ValueError(
                f"{name}={value!r} is not read with {choice}={chosen!r}, only with "
                f"{' or '.join(repr(other) for other in choices)}; leave it out"
            )


def refuse_without(part: Part, needed: str, names: Iterable[str]) -> None:
    """Raise ValueError for a field that is not as it is by default although `needed`, which makes it be read, is off."""
    for name in names:
        value = getattr(part, name)
        if not getattr(part, needed) and value != type(part).model_fields[name].default:
            raise ValueError(f"{name}={value!r} is not read without {needed}; leave it out, or set {needed}")
