"""Class ids in the content of label members: a whole number, or the name of a class."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

LABEL_FIELDS = ("label", "cls", "class_id")  # the fields of a .json label; the first that exists counts
MAX_QUOTED = 40  # characters of a label, in a message
MAX_NAMES = 5  # classes that a message names
NO_IDS: Mapping[str, int] = MappingProxyType({})
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?")


class LabelError(ValueError):
    """A label that is no class id: the kind of reason, which is counted, and the details."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


def class_ids(classes: Sequence[str]) -> dict[str, int]:
    """Return class ids by name, without names that two classes share and names that are numbers.

    A number in a label is a class id, never a name.
    """
    times = Counter(classes)
    return {name: i for i, name in enumerate(classes) if times[name] == 1 and not _NUMBER.fullmatch(name)}


def parse_label(label: bytes, *, is_json: bool, ids: Mapping[str, int] = NO_IDS) -> int:
    """Return the class id in the content of a label member. ids: class ids by name. Raises LabelError."""
    if is_json:
        return _parse_json(label, ids)
    try:
        # int() takes 1_0 for 10, which no other program does.
        if b"_" not in label:
            return int(label)
    except ValueError:
        pass
    text = _decode(label, ".cls")
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)  # behind a byte order mark, or in UTF-16
    return _class_named(text, ".cls", ids)


def _parse_json(label: bytes, ids: Mapping[str, int]) -> int:
    try:
        value = json.loads(label)
    except (ValueError, RecursionError) as error:
        raise LabelError(".json cannot be read", str(error)) from None
    if not isinstance(value, dict):
        raise LabelError(".json is not an object", f"it holds {_quote(value)}; a label is its {_fields()}")
    name = next((name for name in LABEL_FIELDS if name in value), None)
    if name is None:
        present = ", ".join(map(str, value)) or "nothing"
        raise LabelError(f".json has no {_fields()}", f"it has {_short(present)}")
    found = value[name]
    if isinstance(found, int) and not isinstance(found, bool):
        return found
    if isinstance(found, str):
        return _class_named(found.strip(), ".json", ids)
    raise LabelError(".json label is not a whole number", f"{name} is {_quote(found)}")


def _class_named(text: str, member: str, ids: Mapping[str, int]) -> int:
    """Return the id of the class that is named so. Raises LabelError."""
    if text in ids:
        return ids[text]
    if not text:
        raise LabelError(f"{member} label is empty")
    if _NUMBER.fullmatch(text) or not text.isprintable():
        raise LabelError(f"{member} label is not a whole number", f"it is {_quote(text)}")
    if ids:
        raise LabelError(f"{member} label is not the name of one class", f"it is {_quote(text)}")
    raise LabelError(
        f"{member} label is a word, not a number; --classes FILE names the classes", f"it is {_quote(text)}"
    )


def _decode(label: bytes, member: str) -> str:
    encoding = "utf-16" if label.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return label.decode(encoding).strip()
    except UnicodeDecodeError:
        raise LabelError(f"{member} label is not text", f"it is {_short(repr(label))}") from None


def _fields() -> str:
    return f"{', '.join(LABEL_FIELDS[:-1])} or {LABEL_FIELDS[-1]}"


def _quote(value: Any) -> str:
    try:
        return _short(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        return f"a nested {type(value).__name__}"


def _short(text: str) -> str:
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"


def check_label(label: int, num_classes: int) -> int:
    """Return the label. Raises ValueError where the index has no class for it."""
    if not 0 <= label < num_classes:
        raise ValueError(f"label {label} is not one of the {num_classes} classes of the index")
    return label


def class_difference(one: Sequence[str], other: Sequence[str]) -> str | None:
    """Return how two lists of class names differ, with the first few names that do; None where they are the same."""
    if tuple(one) == tuple(other):
        return None
    differing = [label for label, names in enumerate(zip(one, other, strict=False)) if names[0] != names[1]]
    shown_names = [f"label {i} is {one[i]!r} and {other[i]!r}" for i in differing[:MAX_NAMES]]
    longer = max(one, other, key=len)
    extra = [repr(name) for name in longer[min(len(one), len(other)) :]]
    if extra and not differing:
        shown_names = [
            f"only one of them has {', '.join(extra[:MAX_NAMES])}{', …' * (len(extra) > MAX_NAMES)}"
        ]
    elif len(differing) > MAX_NAMES:
        shown_names.append("…")
    return f"{len(one):,} and {len(other):,} classes; {', '.join(shown_names)}"
