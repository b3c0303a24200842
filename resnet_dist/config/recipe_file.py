"""Run a recipe file as Python runs a script: it may import its neighbours, but these never hide a library."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from resnet_dist.errors import RecipeError

MODULE_NAME = "__recipe__"  # A neighbour may be called recipe.py.
DISTRIBUTION = "resnet-dist"


def read_source(path: Path, kind: str, function: str) -> bytes:
    """Return the bytes of a recipe file. kind and function: "recipe" and "recipe", or "job" and "study", for messages.

    Raises RecipeError where it cannot be read, with what a file of this kind is.
    """
    article = f"a {function} is a .py file that defines {function}()"
    if path.suffix == ".ipynb":
        raise RecipeError(f"{path}: is a notebook; {article}")
    try:
        if path.is_dir():
            raise RecipeError(f"{path}: is a folder; {article}")
        # A pipe too: a shell's <(…) is one.
        if path.is_file() or path.is_fifo():
            return path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); {article}") from None
    raise RecipeError(f"{path}: no such {kind} file; {article}")


def call_function(path: Path, source: bytes, name: str, returns: str, arguments: Mapping[str, Any]) -> Any:
    """Call function `name` of a Python file and return its value, which should be of class `returns`.

    Raises RecipeError where the function is missing, does not take the arguments, or raises: with file and line.
    ValidationErrors of a part of the recipe pass through.
    """
    with as_script(path) as module:
        try:
            exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
            make: Any = getattr(module, name, None)
            _check_callable(path, make, name, returns, arguments)
            return make(**arguments)
        except (RecipeError, ValidationError, KeyboardInterrupt):
            raise
        except BaseException as error:  # The file is the user's code, so SystemExit is a mistake in it too.
            raise RecipeError(_explain(error, path)) from None


def _check_callable(path: Path, make: Any, name: str, returns: str, arguments: Mapping[str, Any]) -> None:
    if type(make).__name__ == returns:
        raise RecipeError(f"{path}: {name} is a {returns}, must be a function {name}() that returns it")
    if not callable(make):
        raise RecipeError(f"{path}: defines no function {name}() -> {returns}")
    parameters = inspect.signature(make).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for argument in arguments:
        if argument not in parameters:
            takes = f"takes {', '.join(parameters)}" if parameters else "takes no arguments"
            raise RecipeError(f"{argument} is no argument of {name}() in {path}, which {takes}")
    required = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_POSITIONAL
        and parameter.name not in arguments
    ]
    if required:
        raise RecipeError(
            f"{path}: {name}() requires {', '.join(required)}; give each argument a default value"
        )


def _explain(error: BaseException, path: Path) -> str:
    """Return one sentence for an error of the file: its line, or that of the neighbour where it was raised."""
    folder = f"{path.resolve().parent}{os.sep}"
    file, line = str(path), "?"
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path) or frame.filename.startswith(folder):
            file, line = frame.filename, str(frame.lineno)
    if isinstance(error, SyntaxError) and error.filename:
        file, line = error.filename, str(error.lineno or "?")
    if file.startswith(folder):
        file = str(path.parent / file.removeprefix(folder))
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        text = " ".join(str(error.msg).split())
    message = f"{file}, line {line}: {type(error).__name__}{f': {text}' if text else ''}"
    module = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    hidden = _neighbour(path.resolve().parent, module) if module else None
    if hidden is not None and hidden.origin is not None and _is_library(module):
        message += (
            f"; {path.parent / Path(hidden.origin).name} has the name of a library, which hides it: rename it"
        )
    return message


@contextmanager
def as_script(path: Path) -> Iterator[ModuleType]:
    """Yield the module of a file that is run as a script; afterwards nothing of it is left in this process."""
    module = ModuleType(MODULE_NAME)
    module.__file__ = str(path)
    # Python resolves a link to a script: its neighbours are those of the file itself.
    finder = _NeighbourFinder(path.resolve().parent)
    arguments = sys.argv
    folder = os.open(".", os.O_RDONLY)  # By its number: it may have been removed.
    importlib.invalidate_caches()
    sys.argv = [str(path)]
    sys.modules[MODULE_NAME] = module  # Dataclasses look their module up.
    sys.meta_path.insert(0, finder)
    try:
        yield module
    finally:
        sys.meta_path.remove(finder)
        sys.argv = arguments
        os.fchdir(folder)
        os.close(folder)
        # The next recipe may have neighbours of the same names.
        for name in [MODULE_NAME, *sys.modules]:
            if name == MODULE_NAME or name.partition(".")[0] in finder.found:
                sys.modules.pop(name, None)


class _NeighbourFinder(MetaPathFinder):
    """Finds the modules and packages beside a recipe file, except where a library has the name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.found: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None or fullname in sys.stdlib_module_names:
            return None
        spec = _neighbour(self._folder, fullname)
        if spec is None:
            return None
        elsewhere = PathFinder.find_spec(fullname, sys.path)
        if elsewhere is not None and elsewhere.origin != spec.origin:
            # A folder without __init__.py counts only where there is nothing else of its name, as for Python.
            if spec.loader is None and elsewhere.loader is not None:
                return None
            if _is_library(fullname):
                return None
        self.found.add(fullname)
        return spec


def _neighbour(folder: Path, name: str) -> ModuleSpec | None:
    return PathFinder.find_spec(name, [str(folder)])


def _is_library(name: str) -> bool:
    """Report whether a module belongs to Python, or to a package that this one requires."""
    from importlib import metadata  # Here, because it is hardly ever needed.

    if name in sys.stdlib_module_names:
        return True
    providers = {_normal(provider) for provider in metadata.packages_distributions().get(name, ())}
    if not providers:
        return False
    seen, todo = set[str](), [DISTRIBUTION]
    while todo:
        distribution = _normal(todo.pop())
        if distribution in providers:
            return True
        if distribution in seen:
            continue
        seen.add(distribution)
        try:
            requirements = metadata.requires(distribution) or ()
        except metadata.PackageNotFoundError:
            if distribution == DISTRIBUTION:  # A plain checkout: nothing states what it requires.
                return True
            continue
        todo += [re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0] for text in requirements]
    return False


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
