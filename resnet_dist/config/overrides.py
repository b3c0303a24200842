"""`KEY=VALUE` on the command line: the text that a person typed, read as the type of its field.

The type decides, not the look of the text: a name of `1e3`, `007` or `true` stays that word, while the same text for a
number is a number. Lists may be written as in JSON or as in Python.
"""

from __future__ import annotations

import ast
import json
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from resnet_dist.config.part import Part
from resnet_dist.errors import RecipeError

NOTHING = ("none", "null", "off")  # words for a field that is switched off
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def annotation_of(part: type[Part], key: str) -> Any:
    """Return the type of a field by its dotted name."""
    first, _, rest = key.partition(".")
    annotation = part.model_fields[first].annotation
    if not rest:
        return annotation
    assert isinstance(annotation, type)
    return annotation_of(annotation, rest)


def read_as(annotation: Any, key: str, text: str) -> Any:
    """Return the value of `text` for a field of this type. Raises RecipeError with the way to write it."""
    text = text.strip()
    kinds = members(annotation)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if (word := _unquoted(text)) in choices:
        return word
    if text.lower() in NOTHING and NoneType in kinds:
        return None
    if text.lower() in NOTHING and "none" in choices:
        return "none"
    if (bool in kinds or True in choices) and text.lower() in SWITCHES:
        return SWITCHES[text.lower()]
    if str in kinds:
        return word
    if any(get_origin(kind) is tuple for kind in kinds):
        return _read_list(key, text)
    if int in kinds or float in kinds:
        return _read_number(key, text)
    return parse_value(text)


def parse_value(text: str) -> Any:
    """Return the value of an argument whose type is not known: None, a switch, a number, a list, or the text itself."""
    if text.strip().lower() in ("none", "null"):
        return None
    return _literal(text, text)


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, each once; the type itself where it is none."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(member for part in get_args(annotation) for member in members(part))
    return (annotation,)


def _unquoted(text: str) -> str:
    """Return text without the quotes around it that a shell has left there."""
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _literal(text: str, default: Any) -> Any:
    """Return the value that `text` has in JSON or in Python; `default` where it has none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return default


def _read_number(key: str, text: str) -> Any:
    value = _literal(text, None)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    try:
        float(text)  # such as inf, which the field refuses itself
    except ValueError:
        hint = (
            f"write {text.replace(',', '.')}" if text.count(",") == 1 else "write one such as 2, 0.1 or 1e-4"
        )
        raise RecipeError(f"{key}={text!r}: not a number; {hint}") from None
    return text


def _read_list(key: str, text: str) -> Any:
    value = _literal(text, text)
    if isinstance(value, list | tuple):
        return list(value)
    parts = [part.strip() for part in text.split(",")] if isinstance(value, str) and text else [value]
    shown = ", ".join(
        json.dumps(_literal(part, part)) if isinstance(part, str) else json.dumps(part) for part in parts
    )
    raise RecipeError(f"{key}={text!r}: a list is needed; write '{key}=[{shown}]'")
