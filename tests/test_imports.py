"""Imports point down, and the core runs where Ray and MLflow are not installed."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

PACKAGE = ROOT / "resnet_dist"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("serve.py", "minimal.py"))

# From the top down. A module imports from lower lines or from its own room alone, for type annotations too.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"bench", "study", "sweep", "experiments", "evaluation", "export", "serve", "explain"},
    {"predict"},
    {"terminal", "driver"},
    {"launch"},
    {"tracking"},
    {"figures"},
    {"train"},
    {"runs", "data", "model"},
    {"order"},
    {"config"},
    {"system", "world"},
    {"errors", "search_path", "signal_at_start"},
]
# The rooms inside a room, in the same order.
INNER_LAYERS = {
    "data": [{"prepare", "batches"}, {"shards"}, {"images", "storage"}, {"findings"}],
    "runs": [
        {"choose", "group_folder"},
        {"folder"},
        {"stalls", "page", "lineage", "evaluation_results"},
        {"storage"},
    ],
    "tracking": [
        {"abandoned"},
        {"sync", "locate"},
        {"open"},
        {"mlflow", "also"},
        {"console"},
        {"protocol"},
        {"backlog"},
        {"spool", "store", "origin"},
        {"logged_run", "registration"},
    ],
    "train": [
        {"loop"},
        {"parts", "log_lines"},
        {"start"},
        {"checkpoint", "evaluate", "step"},
        {"optim", "plan", "watch"},
        {"state"},
        {"device", "tracker"},
        {"predictions"},
    ],
}
# The rooms that training needs; they run where Ray and MLflow are not installed.
CORE = {"errors", "config", "order", "world", "model", "data", "train"}
MAX_MODULES_PER_FOLDER = 12
MAX_FUNCTION_LINES = 60
# The only modules that import a library, by library.
OWNERS = {
    "ray": (
        "launch/on_ray/",
        "launch/jobs/",
        "launch/ray_cluster/",
        "sweep/on_tune/",
    ),
    "mlflow": ("tracking/mlflow/",),
    "matplotlib": ("study/figure.py", "sweep/figure.py", "figures/"),
}


def level_of(room: str, layers: list[set[str]]) -> int:
    return next(number for number, rooms in enumerate(layers) if room in rooms)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    tree = parsed(path)
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_of(path: Path) -> list[str]:
    """Return the parts of a module's name inside the package: train/step/loss.py is train, step, loss."""
    return [part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts]


def points_down(path: Path, name: str) -> bool:
    """Report whether a module may import what `name` is."""
    own, parts = rooms_of(path), name.split(".")
    if parts[0] in OWNERS and not str(path.relative_to(PACKAGE)).startswith(OWNERS[parts[0]]):
        return False
    if parts[0] != "resnet_dist" or len(parts) < 3:
        return True
    if parts[1] != own[0]:
        return level_of(parts[1], LAYERS) > level_of(own[0], LAYERS)
    if own[0] not in INNER_LAYERS or parts[2] == own[1]:
        return True
    layers = INNER_LAYERS[own[0]]
    return level_of(parts[2], layers) > level_of(own[1], layers)


def test_imports_point_down() -> None:
    """All modules are one test, as in all checks of this file: a test each would be a third of all tests."""
    modules = [path for path in FILES if path != PACKAGE / "__init__.py"]
    assert len(modules) > 300
    wrong = [(path, name) for path in modules for name in imports(path) if not points_down(path, name)]
    assert not wrong, "\n".join(f"{path.relative_to(PACKAGE)} imports {name}" for path, name in wrong)


@pytest.mark.parametrize(
    ("module", "name", "allowed"),
    [
        ("train/loop.py", "resnet_dist.cli.main", False),
        ("cli/main.py", "resnet_dist.train.loop", True),
        ("train/loop.py", "ray.train", False),
        ("data/images/decode.py", "resnet_dist.data.batches.loader", False),
        ("data/batches/loader.py", "resnet_dist.data.images.decode", True),
    ],
)
def test_the_check_of_imports_can_fail(module: str, name: str, allowed: bool) -> None:
    assert points_down(PACKAGE / module, name) == allowed


def test_every_room_has_its_layer() -> None:
    rooms = {rooms_of(path)[0] for path in FILES} - {"__init__"}
    assert rooms == set().union(*LAYERS)
    for room, layers in INNER_LAYERS.items():
        inside = {rooms_of(path)[1] for path in FILES if rooms_of(path)[0] == room} - {"__init__"}
        assert inside == set().union(*layers)


def test_a_folder_is_seen_at_a_glance() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    for folder in folders:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MAX_MODULES_PER_FOLDER, folder
        assert (folder / "__init__.py").exists(), folder
        inside = {path.stem for path in modules} | {path.name for path in folder.iterdir() if path in folders}
        assert names_on_the_map(folder) == inside - {"__main__"}, folder


def names_on_the_map(folder: Path) -> set[str]:
    """Return the modules and folders that the docstring of `folder` names, one at the start of each line of its map."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    return set(re.findall(r"^ *([a-z_0-9]+)/? {2,}\S", text, re.MULTILINE))


@pytest.mark.parametrize(
    "name",
    [
        "errors",
        "config/recipe",
        "order/samples",
        "order/philox",
        "order/sizes",
        "data/shards/index",
        "train/optim/schedule",
        "runs/folder",
        "runs/choose",
        "runs/storage/open",
        "runs/storage/lease",
    ],
)
def test_pure_modules_know_no_torch(name: str) -> None:
    assert not [module for module in imports(PACKAGE / f"{name}.py") if module.split(".")[0] == "torch"]


def modules_behind(name: str) -> set[str]:
    """Return the modules of the package that a module imports at its top, and those that these import."""
    found, left = set(), [name]
    while left:
        path = PACKAGE / f"{left.pop()}.py"
        if path.exists() and path not in found:
            found.add(path)
            names = [
                one.split(".")[1:] for one in imports(path, top_level=True) if one.startswith("resnet_dist.")
            ]
            left += ["/".join(parts[:end]) for parts in names for end in range(1, len(parts) + 1)]
            left += ["/".join([*parts[:end], "__init__"]) for parts in names for end in range(len(parts) + 1)]
    return {str(path.relative_to(PACKAGE)) for path in found}


def test_the_processes_that_ray_train_starts_import_no_torch() -> None:
    """They start one after the other, and torch takes seconds: the ranks are copies of one that has imported it."""
    behind = modules_behind("launch/on_ray/worker")
    assert {"launch/preload/client.py", "config/recipe.py"} <= behind
    for name in behind:
        assert "torch" not in {one.split(".")[0] for one in imports(PACKAGE / name, top_level=True)}, name


@pytest.mark.parametrize("library", ["ray", "mlflow", "webdataset", "sklearn", "rich", "typer", "timm"])
def test_the_core_imports_no(library: str) -> None:
    core = [path for path in FILES if rooms_of(path)[0] in CORE]
    assert len(core) > 60
    for path in core:
        assert library not in {name.split(".")[0] for name in imports(path, top_level=True)}, path


HELP = """
import sys
from typer.testing import CliRunner
from resnet_dist.cli import app
from typer.main import get_command
def show(command, *words):
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0 and "Usage" in done.output, (words, done.output, done.exception)
    print(*words, "help")
    for name, inner in getattr(command, "commands", {}).items():
        show(inner, *words, name)
show(get_command(app))
slow = {"torch", "ray", "mlflow", "numpy", "matplotlib", "webdataset", "sklearn", "PIL", "fsspec", "filelock", "urllib.request"}
print(slow & set(sys.modules))
"""


def test_the_help_of_every_command_waits_for_no_large_library() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    *shown, loaded = done.stdout.splitlines()
    assert loaded == "set()"
    assert {"help", "train help", "bench loader help", "runs help"} <= set(shown)


PROGRAM = """
import sys
for name in ("ray", "mlflow", "webdataset", "sklearn", "rich", "typer", "timm"):
    sys.modules[name] = None  # importing it now raises ImportError
from pathlib import Path
from resnet_dist.config import Recipe
from resnet_dist.train.loop import train
from resnet_dist.train.start.threads import choose_threads
from resnet_dist.train.tracker import NullTracker
from resnet_dist.world import World
recipe = Recipe.from_json(Path(sys.argv[1]).read_text())
threads = choose_threads(recipe, 1, 1)
outcome = train(recipe, Path(sys.argv[2]), World.single(), NullTracker())
# Each takes a second or more of every start, and is needed only by a recipe that compiles.
print(threads, outcome.step, outcome.metrics["eval/samples"], {"torch._dynamo", "sympy"} & set(sys.modules))
"""


def test_the_core_trains_without_ray_mlflow_and_the_compiler(digits_recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(digits_recipe.with_overrides(["train.length=3 steps"]).to_json())
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(recipe), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "3", "360.0", "set()"]


def test_functions_fit_a_screen() -> None:
    lengths = {
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lengths) > 1000
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}
