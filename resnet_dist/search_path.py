"""The folders where Python finds modules: no file of the working folder may hide a library.

Imported before everything else of the package, so it imports next to nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAFE_PATH_VARIABLE = "PYTHONSAFEPATH"
PACKAGE_PARENT = Path(__file__).resolve().parent.parent
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


def put_working_folder_last() -> None:
    """Search the working folder after all others, where `python -m` has put it first: a queue.py there is no library.

    `resnet-dist` does not search it at all.
    """
    if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path:
        sys.path.append(sys.path.pop(0))


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


def hiding_file(folder: Path | None = None) -> Path | None:
    """Return a file of `folder` that hides a library from Ray's workers; None without.

    By default that beside this package, which they search where the package is not installed.
    """
    if folder is None and is_installed():
        return None
    names = sys.stdlib_module_names | LIBRARIES
    candidates = (path for path in sorted((folder or PACKAGE_PARENT).iterdir()) if path.stem in names)
    return next(
        (path for path in candidates if path.suffix == ".py" or (path / "__init__.py").exists()), None
    )
