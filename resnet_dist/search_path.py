"""The folders where Python finds modules: no file of the working folder may hide a library.

Imported before everything else of the package. Above `leave_out_working_folder()` it imports what Python itself has
loaded by then, so no `from __future__` either: that is a module too.
"""

import os
import sys

_PARENT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def leave_out_working_folder() -> None:
    """Stop the search of the working folder, where `python -m` looks first: a queue.py there is no library.

    `resnet-dist` does not search it at all. Where this package lies there, it is searched last.
    """
    if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path:
        folder = sys.path.pop(0)
        if os.path.realpath(folder) == _PARENT:
            sys.path.append(folder)


leave_out_working_folder()

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAFE_PATH_VARIABLE = "PYTHONSAFEPATH"
PACKAGE_PARENT = Path(_PARENT)
# The libraries that every rank imports; with Python's own modules, no neighbour of the package may have their names.
LIBRARIES = frozenset(
    {
        "filelock",
        "fsspec",
        "google",
        "mlflow",
        "numpy",
        "PIL",
        "pyarrow",
        "pydantic",
        "ray",
        "safetensors",
        "torch",
        "torchvision",
        "typing_extensions",
        "webdataset",
    }
)


@contextmanager
def safe_children() -> Iterator[None]:
    """Keep Python processes that are started inside the block from searching the working folder first."""
    before = os.environ.get(SAFE_PATH_VARIABLE)
    os.environ[SAFE_PATH_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH_VARIABLE]
        else:
            os.environ[SAFE_PATH_VARIABLE] = before


@contextmanager
def neutral_folder() -> Iterator[None]:
    """Work in a folder without modules that hide a library: Ray's workers search the one it is started in first.

    It is that of Python's own modules, or of this package where it is not installed.
    """
    before = os.open(".", os.O_RDONLY)
    os.chdir(Path(os.__file__).parent if is_installed() else PACKAGE_PARENT)
    try:
        yield
    finally:
        os.fchdir(before)
        os.close(before)


def is_installed() -> bool:
    return PACKAGE_PARENT.name in ("site-packages", "dist-packages")


def hiding_file() -> Path | None:
    """Return a file beside this package that hides a library from Ray's workers; None without.

    They search that folder where the package is not installed.
    """
    return None if is_installed() else next(hiding_files(PACKAGE_PARENT), None)


def hiding_files(folder: Path) -> Iterator[Path]:
    """Yield the files and packages of `folder` that hide a library from a process that searches it."""
    names = sys.stdlib_module_names | LIBRARIES
    for path in sorted(folder.iterdir()):
        if path.stem in names and (path.suffix == ".py" or (path / "__init__.py").exists()):
            yield path
