"""The summary of a scan: every kind is counted and named, and the exit code says whether something was left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from resnet_dist.cli.summary import exit_where_left_out, json_of, print_summary
from resnet_dist.data.findings import REPORT_NAME, Findings, one_line, printable
from resnet_dist.data.shards.index import Index


@pytest.fixture
def findings() -> Findings:
    found = Findings(used=1200)
    found.leave_out("cat/bad\udce9.jpg", "an empty file")
    found.leave_out("cat/worse.jpg", "an empty file")
    found.pass_over("two\nlines.txt", "text")
    return found


def test_the_table(findings: Findings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary("train: 1,200 samples", findings, tmp_path / REPORT_NAME)
    assert capsys.readouterr().out.splitlines() == [
        "train: 1,200 samples",
        "  used         1,200",
        "  left out         2  an empty file: cat/bad\\xe9.jpg, …",
        "  passed over      1  text: two\\nlines.txt",
        f"  listed in {tmp_path}/left-out.txt",
    ]
    print_summary("eval", Findings(used=3), tmp_path / REPORT_NAME)
    assert capsys.readouterr().out == "eval\n  used         3\n"


def test_the_json(findings: Findings, tmp_path: Path) -> None:
    index = Index("s3://me:secret@bucket/index.json", (), ("a", "b"))
    assert json_of(findings, tmp_path / REPORT_NAME, index) == {
        "used": 1200,
        "left_out": {"an empty file": 2},
        "passed_over": {"text": 1},
        "classes": 2,
        "shards": 0,
        "index": "s3://***@bucket/index.json",
        "report": f"{tmp_path}/left-out.txt",
    }
    assert json_of(Findings(used=1), tmp_path / REPORT_NAME, index)["report"] is None


def test_the_exit_code(findings: Findings) -> None:
    with pytest.raises(typer.Exit) as end:
        exit_where_left_out(findings, allow_left_out=False)
    assert end.value.exit_code == 3
    exit_where_left_out(findings, allow_left_out=True)
    findings.left_out.clear()
    exit_where_left_out(findings, allow_left_out=False)


def test_the_report_has_a_line_for_each(findings: Findings, tmp_path: Path) -> None:
    path = tmp_path / REPORT_NAME
    assert findings.write(path)
    assert path.read_text().splitlines() == [
        "left out\tcat/bad\\xe9.jpg\tan empty file\t\t1",
        "left out\tcat/worse.jpg\tan empty file\t\t1",
        "passed over\ttwo\\nlines.txt\ttext\t\t1",
    ]
    assert Findings.read(path).rows() == [
        (what, kind, count, one_line(name)) for what, kind, count, name in findings.rows()
    ]
    assert not Findings().write(path)
    assert not path.exists()


def test_names_as_text() -> None:
    assert printable("caf\udce9") == "caf\\xe9"
    assert printable("cafe\u0301 \U0001f408\n") == "cafe\u0301 \U0001f408\n"
    assert one_line("a\nb\x1b[31m\u2028") == "a\\nb\\x1b[31m\\u2028"
    assert printable("\ud800") == "\\ud800"
