"""docs/recipes.md: every field is documented beside its definition, and the page is up to date."""

from __future__ import annotations

import dataclasses
import runpy

import pytest

from resnet_dist.config import Data, Model, Optim, Recipe, Result, Schedule, Study, Train, Trial
from resnet_dist.config.part import Part
from tests.paths import ROOT

SCRIPT = "docs/generate_recipes.py"
GENERATOR = runpy.run_path(str(ROOT / SCRIPT))


@pytest.mark.parametrize("cls", [Recipe, Data, Model, Optim, Schedule, Train, Study, Trial, Result])
def test_every_field_has_a_docstring(cls: type) -> None:
    names = cls.model_fields if issubclass(cls, Part) else [field.name for field in dataclasses.fields(cls)]
    docstrings = GENERATOR["field_docstrings"](cls)
    assert list(docstrings) == list(names)
    assert all(text.endswith(".") for text in docstrings.values())


def test_the_page_is_what_the_script_writes() -> None:
    page = (ROOT / "docs/recipes.md").read_text()
    assert page == GENERATOR["page"](), f"run `uv run python {SCRIPT}`"
