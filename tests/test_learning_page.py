"""docs/learning.md: every line number, name and excerpt is that of the code, and moved code is found again."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_dist.config import load_recipe, load_study
from tests.paths import ROOT

PAGE = "docs/learning.md"


def update_references(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "docs/update_references.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the page and of all that it refers to, to be changed at will."""
    for folder in ("docs", "resnet_dist/model", "resnet_dist/train", "tests/model"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_references_and_excerpts_are_those_of_the_code() -> None:
    done = update_references(ROOT, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_excerpt_has_its_reference() -> None:
    text = (ROOT / PAGE).read_text()
    num_excerpts = text.count("```python\n")
    assert num_excerpts >= 5
    assert len(re.findall(r"\.py#L\d+-L\d+\)[^\n]*(?:\n[^\n]+)*\n\n```python\n", text)) == num_excerpts


def test_every_relative_link_leads_to_a_file() -> None:
    links = re.findall(r"(?<!!)\[[^\]]+\]\((?!https?:|#)([^)#]+)", (ROOT / PAGE).read_text())
    assert len(links) > 20
    for link in links:
        assert (ROOT / "docs" / link).exists(), link


def test_training_losses_are_those_of_the_study() -> None:
    study = ast.get_docstring(ast.parse((ROOT / "jobs/plain_vs_residual.py").read_text())) or ""
    rows = re.findall(
        r"^\| (\d+) layers, (\w+) \|(( \d\.\d+ \|){3})$", (ROOT / PAGE).read_text(), re.MULTILINE
    )
    assert len(rows) == 4
    for depth, net, cells, _ in rows:
        measured = re.search(rf"{net}-{depth} +((?:\d\.\d+ +)+\d\.\d+)", study)
        assert measured, f"jobs/plain_vs_residual.py has no losses of {net}-{depth}"
        assert cells.replace("|", " ").split() == measured[1].split(), f"update {net}-{depth} in {PAGE}"


def test_options_of_the_exercises_are_valid() -> None:
    page = (ROOT / PAGE).read_text()
    overrides = [
        quoted.replace('"', "") for quoted in re.findall(r'--set ([\w.]+=(?:"[^"]+"|\w[\w.]*))', page)
    ]
    assert len(overrides) == page.count("--set ")
    for override in overrides:
        load_recipe(ROOT / "jobs/plain_vs_residual.py").with_overrides(["train.length=2 steps", override])
    (depths,) = re.findall(r'--with "(depths=[^"]+)" --with seeds=1', page)
    assert len(load_study(ROOT / "jobs/plain_vs_residual.py", [depths, "seeds=1"]).trials) == 8


def test_moved_code_is_reported_and_repaired(copy: Path) -> None:
    edit(copy / "resnet_dist/model/blocks.py", "class ResidualBlock", "MOVED = 1\n\n\nclass ResidualBlock")
    done = update_references(copy, "--check")
    assert done.returncode == 1
    lines = (ROOT / "resnet_dist/model/blocks.py").read_text().split("\n")
    line = lines.index("class BasicBlock(ResidualBlock):") + 1
    assert (
        f"`BasicBlock` in resnet_dist/model/blocks.py: is at L{line + 3}, the page has L{line};"
        in done.stdout
    )
    assert update_references(copy).returncode == 0
    assert update_references(copy, "--check").returncode == 0
    assert (copy / PAGE).read_text() != (ROOT / PAGE).read_text()


def test_changed_code_is_reported_and_left_to_a_person(copy: Path) -> None:
    model = copy / "resnet_dist/model"
    edit(model / "blocks.py", "= residual + self.shortcut(x)", "= self.shortcut(x) + residual")
    edit(model / "layers.py", "class SqueezeExcite", "class ChannelGates")
    (model / "stochastic_depth.py").unlink()
    done = update_references(copy)
    assert done.returncode == 1
    for problem in (
        "`ResidualBlock.add` in resnet_dist/model/blocks.py: its lines are not those of the excerpt",
        "`SqueezeExcite` in resnet_dist/model/layers.py: the file defines no such name",
        "`residual_scales` in resnet_dist/model/stochastic_depth.py: there is no such file",
    ):
        assert problem in done.stdout
