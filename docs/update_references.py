"""Keep the line numbers in docs/learning.md true.

    python docs/update_references.py            rewrite the numbers that are out of date
    python docs/update_references.py --check    list them, and exit with 1 if there are any

Two kinds of link carry line numbers:

    [`ResNet.forward`](../resnet_dist/model/resnet.py#L78)         the line that defines the name
    [`ResNet.forward`](../resnet_dist/model/resnet.py#L78-L92)     the lines of the excerpt that follows

A name is a function, class, method, variable, or an attribute that a method sets on self. An excerpt is a fenced
Python block; it must stand in the file word for word, up to its indentation, inside the definition of that name.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PAGE = Path(__file__).with_name("learning.md")
REFERENCE = re.compile(r"\[`(?P<name>[\w.]+)`\]\((?P<path>[\w./]+\.py)#(?P<lines>L\d+(?:-L\d+)?)\)")
EXCERPT = re.compile(r"```python\n(?P<code>.*?)```", re.DOTALL)


def main(arguments: list[str]) -> int:
    """Check or rewrite the page; return the exit code, 1 where something is left for a person to do."""
    check_only = "--check" in arguments
    text = PAGE.read_text()
    problems = []

    def corrected(reference: re.Match[str]) -> str:
        name, path, lines = reference["name"], reference["path"], reference["lines"]
        line_of_page = text.count("\n", 0, reference.start()) + 1
        link = f"docs/{PAGE.name}:{line_of_page}: `{name}` in {path.removeprefix('../')}"
        try:
            now = true_lines(text, reference)
        except LookupError as error:
            problems.append(f"{link}: {error.args[0]}")
            return reference[0]
        if now != lines and check_only:
            problems.append(
                f"{link}: is at {now}, the page has {lines}; run python docs/update_references.py"
            )
        return f"[`{name}`]({path}#{now})"

    updated = REFERENCE.sub(corrected, text)
    if not check_only:
        PAGE.write_text(updated)
    print("\n".join(problems) or "All references are true.")
    return 1 if problems else 0


def true_lines(text: str, reference: re.Match[str]) -> str:
    """Return `L12` or `L12-L20`, what the reference should have. Raises LookupError where nothing fits."""
    path = PAGE.parent / reference["path"]
    if not path.is_file():
        raise LookupError("there is no such file")
    names = definitions(path)
    if reference["name"] not in names:
        raise LookupError("the file defines no such name; correct the name or the path")
    begin, end = names[reference["name"]]
    if "-" not in reference["lines"]:
        return f"L{begin}"
    excerpt = EXCERPT.search(text, reference.end())
    if excerpt is None or "\n\n" in text[reference.end() : excerpt.start()].rstrip():
        raise LookupError("a reference with a range of lines must stand in the paragraph above its excerpt")
    code, source = excerpt["code"].rstrip().split("\n"), path.read_text().split("\n")
    for first in range(begin, end - len(code) + 2):
        last = first + len(code) - 1
        if dedented(source[first - 1 : last]) == dedented(code):
            return f"L{first}-L{last}"
    raise LookupError("its lines are not those of the excerpt; copy them anew")


def dedented(lines: list[str]) -> str:
    return textwrap.dedent("\n".join(lines))


@cache
def definitions(path: Path) -> dict[str, tuple[int, int]]:
    """Return the first and last line of everything that a file defines, by qualified name."""
    found: dict[str, tuple[int, int]] = {}
    for name, node in defined(ast.parse(path.read_text()).body):
        found.setdefault(name, (node.lineno, node.end_lineno or node.lineno))
    return found


def defined(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Yield functions, classes and variables, then the members of classes, as `Class.member`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from defined(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and prefix:
            yield from attributes(node, prefix)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    yield prefix + target.id, node


def attributes(method: ast.FunctionDef, prefix: str) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the attributes that a method sets on self."""
    for node in ast.walk(method):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    yield prefix + target.attr, node


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
