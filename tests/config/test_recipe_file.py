"""A recipe file runs as a script does: with its neighbours, and whatever its name, but never instead of a library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_dist.config import Recipe, load_recipe, load_study
from resnet_dist.errors import RecipeError
from tests.paths import JOBS, ROOT

DIGITS = (JOBS / "digits.py").read_text()
MINE = DIGITS.replace("from resnet_dist import", "LINE\nfrom resnet_dist import").replace("lr=0.1", "lr=LR")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def recipe_with(folder: Path, line: str, name: str = "mine.py") -> Path:
    """Write a recipe whose learning rate is the LR of `line`, which imports it."""
    return write(folder / name, MINE.replace("LINE", line))


@pytest.mark.parametrize(
    ("line", "neighbour"),
    [
        ("from common import LR", "common.py"),
        ("import common; LR = common.LR", "common.py"),
        ("from common.rates import LR", "common/rates.py"),  # a folder without __init__.py
        ("from tests import LR", "tests.py"),  # a name that this process imports from elsewhere
        ("from numpy_ import LR", "numpy_/__init__.py"),
        ("from recipe import LR", "recipe.py"),
    ],
)
def test_neighbours(line: str, neighbour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path_before = list(sys.path)
    if neighbour == "tests.py":
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            monkeypatch.delitem(sys.modules, name)
    for number, rate in enumerate((0.25, 0.5)):  # Two recipes whose neighbours have one name.
        folder = tmp_path / f"exp{number}"
        write(folder / neighbour, f"LR = {rate}")
        for path in (recipe_with(folder, line), Path(f"exp{number}/mine.py")):
            assert load_recipe(path).optim.lr == rate
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    assert [file for file in files if file.startswith(str(tmp_path))] == []
    assert "__recipe__" not in sys.modules
    assert sys.path == path_before


def test_a_link_has_the_neighbours_of_its_file(tmp_path: Path) -> None:
    write(tmp_path / "real/common.py", "LR = 0.25")
    recipe_with(tmp_path / "real", "from common import LR")
    (tmp_path / "link.py").symlink_to("real/mine.py")
    assert load_recipe(tmp_path / "link.py").optim.lr == 0.25


def test_an_import_when_the_function_is_called(tmp_path: Path) -> None:
    write(tmp_path / "common.py", "LR = 0.25")
    text = DIGITS.replace("    return Recipe(", "    from common import LR\n    return Recipe(").replace(
        "lr=0.1", "lr=LR"
    )
    assert load_recipe(write(tmp_path / "late.py", text)).optim.lr == 0.25


def test_a_study_imports_its_neighbours_at_its_end(tmp_path: Path) -> None:
    write(tmp_path / "common.py", "TITLE = 'deeper is better'")
    text = (
        "from resnet_dist import *\nimport runpy\n"
        f"make = runpy.run_path({str(JOBS / 'digits.py')!r})['recipe']\n"
        "def conclude(results):\n    from common import TITLE\n    return TITLE\n"
        "def study():\n    return Study('s', (Trial('a', make(), {'x': '1'}),), 'x', 'x', 1, conclude, __doc__)\n"
    )
    study = load_study(write(tmp_path / "job.py", text))
    assert study.conclude([]) == "deeper is better"
    assert study.description == ""


def test_no_neighbour_hides_a_library(tmp_path: Path) -> None:
    """In a process of its own: here most libraries are imported already."""
    names = (
        "types",
        "queue",
        "logging",
        "random",
        "ray",
        "torch",
        "numpy",
        "mlflow/__init__",
        "yaml/__init__",
    )
    for name in names:
        write(tmp_path / f"{name}.py", f"raise SystemExit('wrong {name}')")
    recipe_with(tmp_path, "import numpy, yaml, queue, random, logging; LR = float(numpy.float64(0.25))")
    program = "import sys; from resnet_dist import config; print(config.load_recipe(sys.argv[1]).optim.lr)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "mine.py")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("0.25\n", "")


@pytest.mark.parametrize(
    "name",
    [
        "my recipe.py",
        "recipe-v1.2.py",
        "größe.py",
        "gro\u0308ße.py",
        "2026.py",
        "no_suffix",
        "class.py",
        "a.b.c",
        "-x.py",
    ],
)
def test_names_of_files(name: str, tmp_path: Path) -> None:
    assert load_recipe(recipe_with(tmp_path, "LR = 0.25", name)).optim.lr == 0.25


def test_no_docstring_is_an_empty_description(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path / "a.py", DIGITS[DIGITS.index('"""', 3) + 3 :])).description == ""
    program = (
        "import sys; from resnet_dist import config; print(repr(config.load_recipe(sys.argv[1]).description))"
    )
    command = [sys.executable, "-OO", "-c", program, str(JOBS / "digits.py")]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout == "''\n"


def test_what_a_file_does_to_the_process_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = "import os, sys; os.chdir('/'); LR = 0.25 if sys.argv == [__file__] else 1"
    assert load_recipe(recipe_with(tmp_path, line)).optim.lr == 0.25
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import common\n", "common.py, line 2: NameError: name 'nothing' is not defined"),
        ("import broken\n", "broken.py, line 1: SyntaxError: '(' was never closed"),
        ("def recipe(lr): ...", "mine.py: recipe() requires lr; give each argument a default value"),
        ("def recipe(*, a, b=1): ...", "recipe() requires a; give"),
        ("async def recipe(): ...", "recipe() returned coroutine, must return a Recipe"),
        ("recipe = 3", "defines no function recipe() -> Recipe"),
        ("import sys\nsys.exit()", "mine.py, line 2: SystemExit"),
        ("raise ValueError('one\\n  two')", "mine.py, line 1: ValueError: one two"),
        ("from types import LR", "types.py has the name of a library, which hides it: rename it"),
        ("import commmon", "mine.py, line 1: ModuleNotFoundError: No module named 'commmon'"),
        (b"x = '\xff'", "mine.py, line 1: SyntaxError: "),
        (b"x = 1\0", "mine.py, line "),
        (
            f"import runpy\nrecipe = runpy.run_path({str(JOBS / 'digits.py')!r})['recipe']()",
            "recipe is a Recipe, must be",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine 'recipe' was never awaited")
def test_mistakes_in_a_file(text: str | bytes, words: str, tmp_path: Path) -> None:
    write(tmp_path / "common.py", "\nnothing")
    write(tmp_path / "broken.py", "x = (")
    write(tmp_path / "types.py", "LR = 1")
    path = tmp_path / "mine.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.ipynb", "{}")
    for name, words in (
        (".", "is a folder"),
        ("gone.py", "no such recipe file"),
        ("-", "no such recipe file"),
        ("a.ipynb", "is a notebook"),
        ("a.ipynb/x.py", "no such recipe file"),
        ("/dev/null", "no such recipe file"),
        ("x" * 300, "cannot be read"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_recipe(name)
    reading, writing = os.pipe()  # a shell's <(…)
    os.write(writing, DIGITS.encode())
    os.close(writing)
    assert isinstance(load_recipe(f"/dev/fd/{reading}"), Recipe)
    os.close(reading)
