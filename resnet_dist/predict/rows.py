"""Predictions as rows: a table for a person, JSON or CSV for a program. Rows are written as they come."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Literal

from resnet_dist.data.findings import one_line
from resnet_dist.predict.classify import Prediction
from resnet_dist.predict.thumbnails import SIDE

Form = Literal["table", "json", "csv"]
Write = Callable[[Sequence[Prediction]], str]  # predictions → the lines of their rows
MAX_CLASS_WIDTH = 30  # characters of a class name in a table


def writer_of(form: Form, classes: Sequence[str], top_k: int) -> tuple[str, Write]:
    """Return the heading of the rows, which may be empty, and what writes some of them; both end with a new line."""
    top_k = min(top_k, len(classes))
    if form == "json":
        return "", _json_lines
    if form == "csv":
        columns = [f"{name}_{rank}" for rank in range(1, top_k + 1) for name in ("class", "probability")]
        return _csv([["input", *columns, "problem"]]), lambda rows: _csv(_cells(row, top_k) for row in rows)
    width = min(MAX_CLASS_WIDTH, max(len(one_line(name)) for name in classes))
    return "", lambda rows: _table(rows, width)


def _json_lines(rows: Sequence[Prediction]) -> str:
    return "".join(
        json.dumps(
            {
                "input": row.name,
                "classes": row.classes,
                "probabilities": [float(f"{value:.9g}") for value in row.probabilities],
                "problem": row.problem,
            }
        )
        + "\n"
        for row in rows
    )


def _csv(rows: object) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)  # type: ignore[arg-type]
    return file.getvalue()


def _cells(row: Prediction, top_k: int) -> list[str]:
    best = [
        cell
        for name, value in zip(row.classes, row.probabilities, strict=True)
        for cell in (one_line(name), f"{value:.9g}")
    ]
    return [row.name, *best, *[""] * (2 * top_k - len(best)), row.problem or ""]


def _table(rows: Sequence[Prediction], width: int) -> str:
    """Return aligned lines; bad images are left out, since they are reported by themselves."""
    good = [row for row in rows if row.problem is None]
    if good and good[0].thumbnail:
        return "".join(_beside_thumbnail(row, width) for row in good)
    name_width = max((len(row.name) for row in good), default=0)
    return "".join(
        "  ".join(
            [
                f"{row.name:<{name_width}}",
                *(
                    f"{one_line(name)[:MAX_CLASS_WIDTH]:<{width}} {value:7.2%}"
                    for name, value in zip(row.classes, row.probabilities, strict=True)
                ),
            ]
        )
        + "\n"
        for row in good
    )


def _beside_thumbnail(row: Prediction, width: int) -> str:
    """Return the lines of a row: its picture, and beside it the name of the input and a line for each class."""
    classes = [
        f"{one_line(name)[:MAX_CLASS_WIDTH]:<{width}} {value:7.2%}"
        for name, value in zip(row.classes, row.probabilities, strict=True)
    ]
    blank = " " * SIDE
    lines = zip_longest(row.thumbnail, [row.name, *classes])
    return "".join(f"{picture or blank}  {text or ''}".rstrip() + "\n" for picture, text in lines)
