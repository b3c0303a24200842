"""`FIELD=VALUES` on the command line: a range or a list of values that a sweep searches for one field of the recipe.

optim.lr=log:0.01..1     uniform in the logarithm      optim.momentum=0.8..0.99     uniform
data.repeats=int:1..4    whole numbers, both ends included     model.name=resnet20,resnet32   one of a list
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args, get_origin

from resnet_dist.config import Recipe
from resnet_dist.config.overrides import annotation_of, members
from resnet_dist.config.part import fields, nearest
from resnet_dist.errors import RecipeError, UserError

Form = Literal["log", "uniform", "int", "list"]
FORMS = "log:A..B, A..B, int:A..B or a,b,c"
NAMES = ("name", "experiment", "description")  # fields that no result depends on
DIGITS = 4  # of a number that is drawn: a command with it can be read and typed
_RANGE = re.compile(r"(?:(?P<form>log|int):)?(?P<low>.*?)\.\.(?P<high>.*)")


@dataclass(frozen=True)
class Search:
    """The values of one field that a sweep draws from."""

    field: str
    form: Form
    low: float = 0.0
    high: float = 0.0  # included
    choices: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[str, ...]:
        """The values that must be accepted whatever is drawn: both ends of a range, all of a list."""
        return self.choices if self.form == "list" else (self.text_of(self.low), self.text_of(self.high))

    def text_of(self, value: object) -> str:
        """Return a value that was drawn as it is typed: numbers rounded, but never beyond an end."""
        if self.form == "list":
            return str(value)
        if self.form == "int":
            return str(int(value))  # type: ignore[call-overload]
        assert isinstance(value, float)
        rounded = float(f"{value:.{DIGITS}g}")
        return f"{rounded:g}" if self.low <= rounded <= self.high else repr(value)


def read_searches(texts: Sequence[str], recipe: Recipe, overrides: Sequence[str] = ()) -> tuple[Search, ...]:
    """Return the searches of a command. Raises UserError where one cannot be read, or its values are refused.

    overrides: of the same command; they may not set a field that is searched.
    """
    if not texts:
        raise UserError(
            "--search is missing: a sweep needs a field or more, such as --search optim.lr=log:0.01..1"
        )
    found = tuple(_read(text) for text in texts)
    set_fields = [text.partition("=")[0].strip() for text in overrides]
    for search in found:
        if [other.field for other in found].count(search.field) > 1:
            raise UserError(
                f"--search {search.field}: is searched twice; give all its values in one --search"
            )
        if search.field in set_fields:
            raise UserError(f"--set {search.field}: --search draws this field; leave one of them out")
        if search.form != "list":
            for end in search.ends:
                check_value(recipe, search.field, end)
    return found


def check_value(recipe: Recipe, field: str, value: str) -> None:
    """Raise UserError where the recipe does not take the value."""
    try:
        recipe.with_overrides([f"{field}={value}"])
    except RecipeError as error:
        raise UserError(f"--search {field}: {str(error).removeprefix('--set ')}") from None


def check_scheduler(name: str, recipe: Recipe) -> None:
    """Raise UserError where a scheduler would have nothing to decide on."""
    every = recipe.train.eval_every
    if name == "asha" and every.startswith("0 "):
        raise UserError(
            f"--scheduler {name}: train.eval_every={every!r} evaluates at the end alone; set it to a part of the length, such "
            "as --set train.eval_every='10 percent'"
        )


def is_number(field: str) -> bool:
    """Report whether a field of the recipe takes numbers."""
    return _takes(field, int) or _takes(field, float)


def num_combinations(searches: Sequence[Search]) -> float:
    """Return the number of different trials that can be drawn: infinite with a range of fractions."""
    sizes = (
        len(search.choices)
        if search.form == "list"
        else search.high - search.low + 1
        if search.form == "int"
        else math.inf
        for search in searches
    )
    return math.prod(sizes)


def _read(text: str) -> Search:
    field, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not field or not values:
        raise UserError(f"--search {text}: must be FIELD={FORMS}")
    if field not in dict(fields(Recipe)):
        raise UserError(f"--search {field}: not a field of the recipe{nearest(field, Recipe)}")
    if field in NAMES:
        raise UserError(f"--search {field}: no result depends on it; search another field, such as optim.lr")
    has_form = values.startswith(("log:", "int:"))
    if has_form or (".." in values and is_number(field)):
        return _range(field, values)
    choices = tuple(dict.fromkeys(_split(values)))
    if len(choices) < 2:
        raise UserError(
            f"--search {text}: has one value; give two or more ({FORMS}), or use --set {field}={choices[0]}"
        )
    return Search(field, "list", choices=choices)


def _range(field: str, values: str) -> Search:
    """Read a range. Raises UserError with the way to write it."""
    found = _RANGE.fullmatch(values)
    ends = [] if found is None else [_number(found[name]) for name in ("low", "high")]
    if found is None or None in ends:
        raise UserError(
            f"--search {field}={values}: not a range; write it as log:0.01..1, 0.1..0.9 or int:1..4"
        )
    low, high = (float(end) for end in ends if end is not None)
    form: Form = {"log": "log", "int": "int"}.get(found["form"] or "", "uniform")  # type: ignore[assignment]
    here = f"--search {field}={values}"
    if not is_number(field):
        raise UserError(f"{here}: the field takes no numbers; give a list of values, a,b,c")
    if low >= high:
        raise UserError(f"{here}: the first end must be below the second; write {form_of(form, high, low)}")
    if form == "log" and low <= 0:
        raise UserError(
            f"{here}: a logarithm needs ends above 0; write A..B without log:, or a larger first end"
        )
    if form == "int" and (low % 1 or high % 1):
        raise UserError(f"{here}: the ends of int: must be whole numbers")
    if form != "int" and not _takes(field, float):
        raise UserError(
            f"{here}: the field takes whole numbers; write int:{math.ceil(low)}..{math.floor(high)}, or a list"
        )
    return Search(field, form, low, high)


def form_of(form: Form, low: float, high: float) -> str:
    """Return a range as it is typed."""
    return f"{'' if form == 'uniform' else f'{form}:'}{low:g}..{high:g}"


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _takes(field: str, kind: type) -> bool:
    kinds = members(annotation_of(Recipe, field))
    literals = {type(choice) for one in kinds if get_origin(one) is Literal for choice in get_args(one)}
    return kind in kinds or kind in literals - {str}


def _split(values: str) -> list[str]:
    """Split a list at its commas, but not inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in values:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        depth += (sign in "[(") - (sign in "])")
        if sign == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]
