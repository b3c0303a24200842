"""A recipe's description as Markdown, which MLflow's page renders: there, single line breaks vanish."""

from __future__ import annotations

import re
from collections.abc import Iterator

# A line such as "Expected  98.5 % top-1": one or two words with a capital, then two spaces or more.
_ENTRY = re.compile(r"(?P<title>[A-Z][\w-]*(?: [\w-]+)?)(?: {2,}|\t+)(?P<text>\S.*)")
_MARKDOWN = re.compile(r"\s*([-*+>|#]|\d+[.)]\s|```|~~~)|\s{4,}\S")  # at the start of a line
COMMANDS = ("Command", "Commands", "Run", "Usage")
MIN_WRAPPED = 70  # characters: a longer line was broken by its writer's editor, and the next one continues it


def markdown(text: str) -> str:
    """Return a text whose lines stay apart: commands as a block of code, titled lines as a table, Markdown as it is."""
    paragraphs = re.split(r"\n\s*\n", text.strip("\n").rstrip())
    return "\n\n".join(_paragraph(paragraph) for paragraph in paragraphs if paragraph.strip())


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    entries = list(_entries(lines))
    if len(entries) > 1:
        return "\n\n".join(_blocks(entries))
    if any(_MARKDOWN.match(line) for line in lines):
        return text
    return "\n".join(
        line.rstrip() + ("  " if number < len(lines) and len(line) < MIN_WRAPPED else "")
        for number, line in enumerate(lines, 1)
    )


def _entries(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield title and lines of each entry of a paragraph; nothing where a line belongs to none."""
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if entry := _ENTRY.fullmatch(line):
            found.append((entry["title"], [entry["text"]]))
        elif found and line.startswith((" ", "\t")):
            found[-1][1].append(line.strip())
        else:
            return
    yield from found


def _blocks(entries: list[tuple[str, list[str]]]) -> Iterator[str]:
    """Yield a block of code for the commands, and a table of the other entries."""
    for title, texts in entries:
        if title in COMMANDS:
            yield "\n".join(("```sh", *texts, "```"))
    rows = [
        f"| **{title}** | {' '.join(texts).replace('|', chr(92) + '|')} |"
        for title, texts in entries
        if title not in COMMANDS
    ]
    if rows:
        yield "\n".join(("| | |", "|---|---|", *rows))
