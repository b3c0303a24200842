"""The language of the code, as far as a program can judge it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.paths import ROOT

FILES = sorted(path for folder in ("resnet_dist", "jobs", "tests") for path in (ROOT / folder).rglob("*.py"))
# A docstring opens with a verb, or with a noun for the thing.
DANGLING = re.compile(r"(What|How|Whether|Of|As)\b")
# Limits are named max_ and min_.
LIMIT_NAMES = re.compile(r"_*(most|least)_", re.IGNORECASE)


def docstrings(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """Yield name, line and docstring of the module and of its public classes and functions."""
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = getattr(node, "name", "the module")
        if name.startswith("_") and not name.startswith("__"):
            continue
        if text := ast.get_docstring(node):
            yield name, getattr(node, "lineno", 1), text
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += node.body


def names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield every name that the module gives to something, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """Return every module by its path in the repository."""
    assert len(FILES) > 500
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in FILES}


def test_docstrings_open_with_a_verb_or_a_noun(trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{path}:{line} {name}: {text.splitlines()[0]}"
        for path, tree in trees.items()
        for name, line, text in docstrings(tree)
        if DANGLING.match(text)
    ]
    assert not wrong, "\n".join(wrong)


def test_limits_are_max_and_min(trees: dict[str, ast.Module]) -> None:
    wrong = [
        f"{path}:{line} {name}"
        for path, tree in trees.items()
        for name, line in names(tree)
        if LIMIT_NAMES.match(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_checks_can_fail() -> None:
    tree = ast.parse('"""How it goes."""\nMOST_FILES = 1\ndef f(least_share):\n    """Whether it is."""')
    assert [name for name, _, text in docstrings(tree) if DANGLING.match(text)] == ["the module", "f"]
    assert [name for name, _ in names(tree) if LIMIT_NAMES.match(name)] == ["MOST_FILES", "least_share"]
