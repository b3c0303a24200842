"""No file of the working folder hides a library: not from a command, nor from the processes that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_dist import search_path
from resnet_dist.errors import UserError
from resnet_dist.launch.on_ray.launcher import connected
from resnet_dist.search_path import SAFE_PATH_VARIABLE, neutral_folder, safe_children
from tests.paths import JOBS, ROOT

# `python -m` imports these before any code of a package, so that no command works beside them without -P.
BEFORE_ANY_PACKAGE = {
    *("collections", "contextlib", "functools", "importlib", "keyword"),
    *("operator", "reprlib", "types", "warnings"),
}
# With modules of other systems, which libraries try to import here too.
NAMES = sorted(
    {name for name in sys.stdlib_module_names if name == "__future__" or not name.startswith("_")}
    | {"ray", "mlflow", "torch", "numpy", "tensorflow", "pandas"}
)
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("RAY_", "MLFLOW_", "PYTHONSAFE"))
} | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    """Return a folder of files that end whoever imports them."""
    for name in {*NAMES} - BEFORE_ANY_PACKAGE:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')")
    return tmp_path


def run(wrong: Path, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-m", "resnet_dist", *words]
    pipes = {"capture_output": True, "text": True}
    return subprocess.run(command, cwd=wrong, env=ENVIRONMENT, timeout=400, check=False, **pipes)  # type: ignore[call-overload, no-any-return]


def test_a_command_in_such_a_folder(wrong: Path) -> None:
    done = run(wrong, "train", "gone.py", "--local")
    assert (done.returncode, done.stderr.startswith("error: gone.py: no such recipe file")) == (2, True), (
        done.stderr
    )


def test_the_remedy_of_the_page_where_python_itself_does_not_start(wrong: Path) -> None:
    """docs/troubleshooting.md names `python -P -m resnet_dist`."""
    for name in BEFORE_ANY_PACKAGE:
        (wrong / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')")
    assert "the wrong" in run(wrong, "--help").stderr
    done = run(wrong, "train", "gone.py", "--local", options=("-P",))
    assert (done.returncode, done.stderr.startswith("error: gone.py: no such recipe file")) == (2, True), (
        done.stderr
    )


@pytest.mark.long
def test_processes_that_prepare_data(wrong: Path) -> None:
    done = run(wrong, "prepare", "digits", "out", "--shards", "4", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert len(list((wrong / "out/train").glob("*.tar"))) == 4


@pytest.mark.long
def test_ranks_on_ray(wrong: Path, digits_data: Path) -> None:
    settings = [f"data.train={digits_data}/train", f"data.eval={digits_data}/eval", "train.length=2 steps"]
    settings += ["model.name=resnet8", "train.eval_every=2 steps", "schedule.warmup=1 steps"]
    sets = [word for setting in settings for word in ("--set", setting)]
    done = run(wrong, "train", str(JOBS / "digits.py"), "--name", "a", *sets)
    assert done.returncode == 0, done.stderr
    assert "step 2/2  eval loss" in done.stdout


def test_ray_starts_in_a_folder_without_them(wrong: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(wrong)
    with neutral_folder():
        assert not any(
            Path(f"{name}.py").read_text().startswith("raise SystemExit")
            for name in NAMES
            if Path(f"{name}.py").exists()
        )
    assert Path.cwd() == wrong


def test_a_library_hidden_by_a_neighbour_of_the_package(wrong: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_path, "PACKAGE_PARENT", wrong)
    with (
        pytest.raises(UserError, match=rf"{wrong}/__future__\.py: has the name of a library.*; rename it"),
        connected(None, workers=1),
    ):
        pass
    for path in wrong.iterdir():
        path.unlink()
    (wrong / "mine.py").touch()
    (wrong / "mlflow").mkdir()  # A folder without __init__.py hides nothing.
    assert search_path.hiding_file() is None
    (wrong / "mlflow/__init__.py").touch()
    assert search_path.hiding_file() == wrong / "mlflow"
    monkeypatch.setattr(search_path, "PACKAGE_PARENT", wrong / "site-packages")
    assert search_path.hiding_file() is None


def test_children_are_told_and_the_variable_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "x"):
        if before is None:
            monkeypatch.delenv(SAFE_PATH_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(SAFE_PATH_VARIABLE, before)
        with safe_children():
            assert os.environ[SAFE_PATH_VARIABLE] == "1"
        assert os.environ.get(SAFE_PATH_VARIABLE) == before
