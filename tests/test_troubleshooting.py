"""Every message on the page of troubleshooting is one that the code prints."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_dist.data.findings import LEFT_OUT
from resnet_dist.errors import (
    INTERRUPTED_EXIT_CODE,
    NO_ANSWER_EXIT_CODE,
    UNSENT_EXIT_CODE,
    ExplainedError,
    UserError,
)
from resnet_dist.launch.jobs.ending import RUNNING_EXIT_CODE
from tests.paths import ROOT

PAGE = ROOT / "docs/troubleshooting.md"
ELLIPSIS = "…"


@functools.cache
def templates() -> list[str]:
    """Return every text of the package, with an ellipsis for each value in it."""
    return list(_templates())


def _templates() -> Iterator[str]:
    for path in (ROOT / "resnet_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else ELLIPSIS for part in node.values
                )


MESSAGES = [
    next(text for text in found if text).strip()
    for found in re.findall(r"^\| (?:``(.+?)``|`(.+?)`)", PAGE.read_text(), re.M)
]


def is_printed(message: str) -> bool:
    """Report whether one text of the code holds all parts of `message`, in order."""
    parts = [re.escape(part.strip()) for part in message.split(ELLIPSIS) if part.strip()]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return any(pattern.search(template) for template in templates())


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_prints_it(message: str) -> None:
    assert is_printed(message)


@pytest.mark.parametrize(
    ("page", "others"),
    [(PAGE, [RUNNING_EXIT_CODE]), (ROOT / "docs/restarts.md", [])],
    ids=["troubleshooting", "restarts"],
)
def test_a_page_has_every_exit_code(page: Path, others: list[int]) -> None:
    table = page.read_text().rpartition("code | meaning |\n")[2].partition("\n\n")[0]
    listed = [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)]
    codes = [0, ExplainedError.exit_code, UserError.exit_code, LEFT_OUT, UNSENT_EXIT_CODE, *others]
    assert listed == [*codes, NO_ANSWER_EXIT_CODE, INTERRUPTED_EXIT_CODE]


def test_the_page_is_read_and_wrong_messages_are_found() -> None:
    assert len(MESSAGES) > 40
    assert not is_printed("nothing listens on that …")
    assert not is_printed("run … was started without … recipe")
