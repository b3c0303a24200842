"""Imports point down, and the core runs where Ray and MLflow are not installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "resnet_dist"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("serve.py", "minimal.py"))

# From the top down, but for what is imported for its types alone; a module imports from lower lines, or from its own.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"bench", "study"},
    {"submit", "terminal"},
    {"driver"},
    {"launch", "torchrun"},
    {"attempt"},
    {"runs", "tracking", "export"},
    {"train"},
    {"evaluate"},
    {"data", "model"},
    {"config", "world"},
    {"interrupts", "launcher", "cpus"},  # know nothing of the package
]
LEVEL = {name: number for number, names in enumerate(LAYERS) for name in names}


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for_types = {id(node) for block in tree.body if is_for_types(block) for node in ast.walk(block)}
    for node in tree.body if top_level else ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_for_types(node: ast.AST) -> bool:
    """`if TYPE_CHECKING:`, which never runs."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    if path.name == "__init__.py" and path.parent == PACKAGE:
        return
    own = part(path)
    for name in imports(path):
        words = name.split(".")
        if words[0] == "ray":
            assert own in ("launch", "submit"), name
        if words[0] == "mlflow":
            assert own in ("tracking", "cli"), name
        if words[0] == "matplotlib":
            assert path == PACKAGE / "tracking/figures.py", name
        if words[0] == "resnet_dist" and words[1] != own and words[1] in LEVEL:
            assert LEVEL[words[1]] > LEVEL[own] or {words[1], own} == {"tracking", "runs"}, name


@pytest.mark.parametrize(
    "name", ["config/recipe", "data/order", "data/philox", "data/index", "train/schedule", "runs"]
)
def test_pure_modules_know_no_torch(name: str) -> None:
    assert not [word for word in imports(PACKAGE / f"{name}.py") if word.split(".")[0] == "torch"]


@pytest.mark.parametrize("library", ["ray", "mlflow", "webdataset", "sklearn", "rich", "typer", "timm"])
def test_the_core_imports_no(library: str) -> None:
    core = [path for path in FILES if part(path) in ("config", "world", "model", "data", "train", "evaluate")]
    assert len(core) > 15
    for path in core:
        assert library not in {name.split(".")[0] for name in imports(path, top_level=True)}, path


def test_help_waits_for_no_large_library() -> None:
    program = "import sys, resnet_dist.cli; print({'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


PROGRAM = """
import sys
for name in ("ray", "mlflow", "webdataset", "sklearn", "rich", "typer", "timm"):
    sys.modules[name] = None  # importing it now raises ImportError
from pathlib import Path
from resnet_dist.config import Recipe
from resnet_dist.train.loop import NullTracker, train
from resnet_dist.world import World
outcome = train(Recipe.from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), World.single(), NullTracker())
print(outcome.step, outcome.metrics["eval/samples"])
"""


def test_the_core_trains_without_ray_and_mlflow(digits_recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(digits_recipe.with_overrides(["train.length=3 steps"]).to_json())
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(recipe), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "360.0"]
