"""The base class of every part of a recipe, and the sentences that explain a wrong field."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

# Names of runs and studies, which are folder names and command-line arguments too.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
NAME_FORM = "use letters, digits, '.', '_' and '-', beginning with one of the first two"
# What other programs call a field.
OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "batch_size": "data.global_batch_size",
    "batch": "data.global_batch_size",
    "epochs": "train.length",
    "num_epochs": "train.length",
    "steps": "train.length",
    "max_steps": "train.length",
    "num_workers": "data.loader_workers",
    "arch": "model.name",
    "wd": "optim.weight_decay",
    "amp": "train.precision",
    "resume": "model.init_from",
}


class Part(BaseModel):
    """A part of a recipe: frozen, and without unknown fields, infinities or NaN.

    The string below a field documents it. docs/generate_recipes.py reads it from the source: pydantic's
    `use_attribute_docstrings` would do so at every import, which costs 28 ms.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        coerce_numbers_to_str=True,
        defer_build=True,  # The validators are built for the first recipe: `--help` has none.
    )


def explain(error: ValidationError, root: type[Part]) -> str:
    """Return one sentence for the first problem of a validation error, and the number of further ones."""
    # An unknown field first: where it is misspelt, the right one is missing too.
    found = error.errors(include_url=False)
    details = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return _explain_one(details, root) + more


def _explain_one(details: ErrorDetails, root: type[Part]) -> str:
    key = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        return f"{key} is not a field of the recipe{nearest(key, root)}"
    message = details["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if details["type"] == "string_pattern_mismatch":  # `name` alone has a pattern.
        message = NAME_FORM
    if details["type"] == "missing":
        return f"{key} is missing: it has no default"
    if isinstance(details["input"], dict) or not key:
        return f"{key}: {message}" if key else message
    return f"{key}={details['input']!r}: {message}"


def nearest(key: str, root: type[Part]) -> str:
    """Return the end of a sentence about an unknown field: the nearest known ones, or all of its part, or all."""
    known = [name for name, _ in fields(root)]
    part, _, leaf = key.rpartition(".")
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f", but a part of it; its fields are {', '.join(inside)}"
    near = [name for name in known if name.rpartition(".")[2] == leaf]
    near = near or [other for name, other in OTHER_NAMES.items() if name == leaf and other in known]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if not near:  # The name of its part says nothing about a misspelt field: compare last components.
        leaves = {name.rpartition(".")[2]: name for name in known}
        near = [leaves[word] for word in difflib.get_close_matches(leaf, leaves, n=1)]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    of_part = [name for name in known if part and name.startswith(f"{part}.")]
    return f"; known are {', '.join(of_part or known)}"


def fields(part: type[Part], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the type of every field, those of nested parts included."""
    for name, field in part.model_fields.items():
        kind: Any = field.annotation
        if get_origin(kind) in (Union, UnionType):
            kind = next(arg for arg in get_args(kind) if arg is not type(None))
        if isinstance(kind, type) and issubclass(kind, Part):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def refuse_unread(part: Part, choice: str, readers: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ValueError for a field that is set although the value of `choice` does not read it.

    readers: for each field, the values of `choice` that read it. Off (0, False, None, empty) and the default do
    not count as set, because a recipe in JSON has every field.
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
    """Raise ValueError for a field that is not at its default although `needed`, which it depends on, is off.

    A length of zero is off, too.
    """
    chosen = getattr(part, needed)
    is_zero = isinstance(chosen, str) and chosen.startswith("0 ")
    for name in names:
        value = getattr(part, name)
        if (not chosen or is_zero) and value != type(part).model_fields[name].default:
            without = f"with {needed}={chosen!r}" if is_zero else f"without {needed}"
            raise ValueError(f"{name}={value!r} is not read {without}; leave it out, or set {needed}")
