"""`--set KEY=VALUE`: the field's type decides how a text is read."""

from __future__ import annotations

from typing import Any

import pytest

from resnet_dist import RecipeError
from resnet_dist.config import load_recipe
from tests.paths import JOBS


def value_of(override: str) -> Any:
    value: Any = load_recipe(JOBS / "digits.py", [override])
    for part in override.partition("=")[0].strip().split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(
    "text", ["1.10", "1e5", "007", "1_000", "true", "NaN", "2026", "0x10", "[a]", "{a: 1}", "on"]
)
def test_text_stays_the_word_that_was_typed(text: str) -> None:
    assert value_of(f"experiment={text}") == text


def test_a_name_that_looks_like_a_number_stays_a_name() -> None:
    assert value_of("name=1e3") == "1e3"


@pytest.mark.parametrize("word", ["None", "null", "off", "NONE"])
@pytest.mark.parametrize("field", ["experiment", "optim.clip_norm", "model.init_from", "train.ema_decay"])
def test_a_field_that_may_be_none_is_switched_off(field: str, word: str) -> None:
    assert value_of(f"{field}={word}") is None


def test_none_is_a_choice_where_the_field_has_it() -> None:
    assert value_of("data.cache=None") == "none"
    assert value_of("model.shortcut=none") == "none"


@pytest.mark.parametrize(
    ("text", "value"), [("False", False), ("no", False), ("0", False), ("on", True), ("Yes", True)]
)
def test_switches(text: str, value: bool) -> None:
    assert value_of(f"optim.nesterov={text}") is value


def test_a_switch_with_a_third_choice() -> None:
    assert value_of("data.flip=True") is True
    assert value_of("data.flip=alternate") == "alternate"


@pytest.mark.parametrize(
    ("text", "value"), [(".1", 0.1), ("+0.1", 0.1), ("1e-1", 0.1), (" 0.2", 0.2), ("1", 1.0)]
)
def test_numbers(text: str, value: float) -> None:
    assert value_of(f"optim.lr={text}") == value


@pytest.mark.parametrize("text", ["[0.3]", "(0.3,)", "[0.3,]", " ( 0.3, ) "])
def test_lists_as_in_json_and_as_in_python(text: str) -> None:
    assert value_of(f"data.mean={text}") == (0.3,)


@pytest.mark.parametrize("text", ["10 epochs", "'10 epochs'", '"10 epochs"'])
def test_quotes_that_a_shell_has_left_are_taken_away(text: str) -> None:
    assert value_of(f"train.length={text}") == "10 epochs"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=1,5", "optim.lr='1,5': not a number; write 1.5"),
        ("optim.lr=0.1f", "optim.lr='0.1f': not a number; write one such as 2, 0.1 or 1e-4"),
        ("optim.lr=", "optim.lr='': not a number; write one such as 2, 0.1 or 1e-4"),
        ("optim.lr=true", "optim.lr='true': not a number; write one such as 2, 0.1 or 1e-4"),
        ("data.mean=0.3", "data.mean='0.3': a list is needed; write 'data.mean=[0.3]'"),
        (
            "schedule.milestones=50 percent,75 percent",
            "schedule.milestones='50 percent,75 percent': a list is needed; write "
            '\'schedule.milestones=["50 percent", "75 percent"]\'',
        ),
    ],
)
def test_a_refusal_says_how_to_write_it(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        value_of(override)
    assert str(refused.value) == message
