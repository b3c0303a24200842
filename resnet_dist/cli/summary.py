"""The end of a command that scans data: one table of what was used, left out and passed over, or its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnet_dist.cli.options import err, out
from resnet_dist.data.findings import LEFT_OUT, Findings, one_line
from resnet_dist.system.redact import redact
from resnet_dist.system.streams import need_stdout

if TYPE_CHECKING:
    from resnet_dist.data.shards.index import Index

AllowLeftOut = Annotated[
    bool, typer.Option("--allow-left-out", help=f"Exit with 0, not {LEFT_OUT}, where something was left out.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Anything that would be left out is an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]


def print_summary(title: str, findings: Findings, report: Path) -> None:
    """Print a title and a table: a row for what was used, and one for each kind that was left out or passed over.

    report: the file that lists every finding; it is named where there are any.
    """
    out.print(redact(one_line(title)))
    rows = [("used", "", findings.used, ""), *findings.rows()]
    width = max(len(f"{count:,}") for _, _, count, _ in rows)
    for what, kind, count, example in rows:
        reason = f"  {kind}: {one_line(example)}" if kind else ""
        more = ", …" if kind and count > 1 else ""
        out.print(redact(f"  {what:<11}  {count:>{width},}{reason}{more}"))
    if len(rows) > 1:
        out.print(redact(f"  listed in {one_line(str(report))}"))


def json_of(findings: Findings, report: Path, index: Index) -> dict[str, object]:
    """Return the JSON of one index: counts, by kind where something was not used; `report` is null without findings."""
    has_findings = bool(findings.left_out or findings.passed_over or findings.unchanged)
    return {
        **findings.as_json(),
        "classes": len(index.classes),
        "shards": len(index.shards),
        "index": redact(one_line(index.location)),
        "report": one_line(str(report)) if has_findings else None,
    }


def print_json(value: Mapping[str, object]) -> None:
    """Print one JSON object on one line of stdout."""
    need_stdout()
    typer.echo(json.dumps(value), file=out.file)


def exit_where_left_out(findings: Findings, *, allow_left_out: bool, has_strict: bool = True) -> None:
    """End the command, which is done, with LEFT_OUT where something was left out and the person did not allow it.

    has_strict: the command has the option --strict.
    """
    if findings.left_out and not allow_left_out:
        strict = ", --strict refuses it" if has_strict else ""
        err.print(
            f"exit code {LEFT_OUT}: {findings.num_left_out:,} left out; --allow-left-out accepts this{strict}"
        )
        raise typer.Exit(LEFT_OUT)
