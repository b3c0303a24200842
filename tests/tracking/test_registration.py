"""A name and an alias for a model, as a person types them."""

from __future__ import annotations

import pytest

from resnet_dist.errors import UserError
from resnet_dist.tracking.registration import Registration


@pytest.mark.parametrize(
    ("text", "name", "alias"),
    [("pets", "pets", None), ("pets@best", "pets", "best"), ("my pets 2.1@a-B_3", "my pets 2.1", "a-B_3")],
)
def test_names_and_aliases(text: str, name: str, alias: str | None) -> None:
    found = Registration.parse(text)
    assert (found.name, found.alias, str(found)) == (name, alias, text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the name is empty"),
        (" ", "the name is empty"),
        ("@best", "the name is empty"),
        (" pets", "spaces around it"),
        ("models:/pets@best", "a name is no path"),
        ("a/b", "a name is no path"),
        ("..", "a name is no path"),
        ("a\nb", "a name is no path"),
        ("x" * 257, "the name has 257 characters"),
        ("pets@", "the alias '' must be letters"),
        ("pets@best one", "the alias 'best one' must be letters"),
        ("pets@a@b", "the alias 'a@b' must be letters"),
        ("pets@" + "x" * 256, "must be letters"),
        ("pets@latest", "MLflow keeps the alias 'latest'"),
        ("pets@V3", "MLflow keeps the alias 'V3'"),
    ],
)
def test_what_mlflow_would_not_take_is_one_sentence(text: str, problem: str) -> None:
    with pytest.raises(UserError) as refused:
        Registration.parse(text)
    message = str(refused.value)
    assert message.startswith("--register ")
    assert problem in message
    assert message.endswith("use NAME or NAME@ALIAS, such as pets@best")
    assert "\n" not in message
