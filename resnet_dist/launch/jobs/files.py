"""The files that travel with a job: the recipe, the script that starts it, and the folder of `--working-dir`.

Ray would pack a folder itself, but it refuses a large one after it has packed all of it, and shows neither its size nor
what it leaves out.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.launch.on_ray.settings import set_defaults

set_defaults()

from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE
from ray._private.thirdparty.pathspec import PathSpec

from resnet_dist.errors import UserError
from resnet_dist.launch.ray_cluster.job import JOB_FOLDER, RECIPE_FILE, START_FILE, start_file_text
from resnet_dist.search_path import hiding_files
from resnet_dist.system.command import DEFAULT_OUTPUT, quoted
from resnet_dist.system.files import expanded

OPTION = "--working-dir"
MAX_BYTES = GCS_STORAGE_MAX_SIZE
BYTES_PER_FILE = 200  # about what a file takes in the package beside its content
MAX_NAMES = 5  # in a message
OUTPUT_FILES = ("runs", "mlflow.db", "data")  # what shows that a folder is an output
_OPENS = os.R_OK | os.X_OK  # what a folder must allow to be walked
TIME = (1980, 1, 1, 0, 0, 0)  # the same for every file, so that the same files are the same package

Rule = tuple[str, PathSpec]  # a folder relative to the working folder, and the patterns that begin there


@dataclass(frozen=True)
class WorkingFolder:
    """The files of a folder that are sent, and what is left out of it."""

    folder: Path  # absolute
    files: dict[str, int]  # bytes by path, relative to the folder
    left_out: tuple[str, ...]  # relative paths; a folder has a slash at its end

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())

    def sent(self, path: Path) -> str | None:
        """Return the relative path of a file, or of a folder of which something is sent; None for everything else."""
        if not path.is_relative_to(self.folder):
            return None
        name = path.relative_to(self.folder).as_posix()
        return name if _is_sent(name, self.files) else None

    def summary(self) -> str:
        """Return the line about what is sent."""
        count = len(self.files)
        text = f"sending {count:,} file{'s' * (count != 1)} ({size(self.num_bytes)}) of {quoted(str(self.folder))}"
        return f"{text}; left out: {_some(self.left_out)}" if self.left_out else text


def read_working_folder(folder: Path, excludes: Sequence[str] = ()) -> WorkingFolder:
    """Return what is sent of a folder. excludes: patterns as in .gitignore, which is heeded too, as .rayignore is.

    Raises UserError where it is no folder, too large for Ray, or has a file that cannot be sent.
    """
    where = f"{OPTION} {quoted(str(folder))}"
    root = Path(os.path.abspath(expanded(folder)))
    if not root.is_dir():
        raise UserError(f"{where}: {'it is no folder' if root.exists() else 'no such folder'}")
    if not os.access(root, _OPENS):
        raise UserError(f"{where}: it cannot be read (no permission)")
    files: dict[str, int] = {}
    left_out: list[str] = []
    for name, path in _walk(root, _first_rules(root, excludes), left_out):
        # The walk yields a folder only where it cannot open it.
        if path.is_dir() or not os.access(path, os.R_OK):
            raise UserError(
                f"{where}: {name} cannot be read (no permission); --exclude {quoted(name)} leaves it out"
            )
        files[name] = path.stat().st_size
    working = WorkingFolder(root, files, tuple(sorted(left_out)))
    if not files:
        raise UserError(f"{where}: it has no file to send{_hint(left_out)}")
    _check_size(where, working)
    for hiding in hiding_files(root):
        if not _is_sent(hiding.name, files):
            continue
        raise UserError(
            f"{where}: {hiding.name} has the name of a library, which no rank could import; rename it, or leave it out: "
            f"--exclude {quoted(f'/{hiding.name}')}"
        )
    return working


def pack(target: Path, recipe_json: str, working: WorkingFolder | None) -> None:
    """Write the package of a job, which Ray unpacks where the job runs and its ranks do."""
    with zipfile.ZipFile(target, "w") as package:
        if working is not None:
            for name in sorted(working.files):
                path = working.folder / name
                _add(package, name, path.read_bytes(), path.stat().st_mode)
        _add(package, RECIPE_FILE, recipe_json.encode(), 0o644)
        _add(package, START_FILE, start_file_text().encode(), 0o644)


def size(num_bytes: float) -> str:
    """Return a number of bytes as a person reads it."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"


def _add(package: zipfile.ZipFile, name: str, content: bytes, mode: int) -> None:
    entry = zipfile.ZipInfo(name, TIME)
    entry.external_attr = (stat.S_IFREG | stat.S_IMODE(mode)) << 16
    package.writestr(entry, content)


def _first_rules(root: Path, excludes: Sequence[str]) -> list[Rule]:
    patterns = [*get_runtime_env_default_excludes(), f"/{JOB_FOLDER}", *excludes]
    output = root / DEFAULT_OUTPUT
    if any((output / name).exists() for name in OUTPUT_FILES):
        patterns.append(f"/{DEFAULT_OUTPUT}")  # Runs and data of this package: gigabytes that no job needs.
    return [("", PathSpec.from_lines("gitwildmatch", patterns))]


def _walk(
    root: Path, rules: list[Rule], left_out: list[str], inside: str = "", above: tuple[str, ...] = ()
) -> Iterator[tuple[str, Path]]:
    """Yield the files below `root`/`inside` that no rule excludes, and folders that cannot be opened.

    What is left out is added to `left_out`.
    """
    folder = root / inside
    rules = [*rules, *_rules_of(folder, inside)]
    above = (*above, os.path.realpath(folder))
    for path in sorted(folder.iterdir()):
        name = path.relative_to(root).as_posix()
        is_folder = path.is_dir()
        shown = f"{name}/" if is_folder else name
        if _is_excluded(shown, rules) or (is_folder and os.path.realpath(path) in above):
            left_out.append(shown)
        elif is_folder and os.access(path, _OPENS):
            yield from _walk(root, rules, left_out, name, above)
        elif is_folder or path.is_file():
            yield name, path
        else:  # A broken link, a socket, a pipe.
            left_out.append(shown)


def _rules_of(folder: Path, inside: str) -> list[Rule]:
    """Return the rules of the ignore files of a folder."""
    names = [".rayignore"]
    if os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1":
        names.append(".gitignore")
    paths = [folder / name for name in names]
    # One that cannot be read is refused as a file that cannot be sent, unless it is excluded.
    files = [path for path in paths if path.is_file() and os.access(path, os.R_OK)]
    return [
        (inside, PathSpec.from_lines("gitwildmatch", file.read_text(errors="replace").splitlines()))
        for file in files
    ]


def _is_excluded(name: str, rules: Sequence[Rule]) -> bool:
    return any(
        patterns.match_file(name.removeprefix(f"{inside}/") if inside else name) for inside, patterns in rules
    )


def _is_sent(name: str, files: dict[str, int]) -> bool:
    return name in files or any(file.startswith(f"{name}/") for file in files)


def _check_size(where: str, working: WorkingFolder) -> None:
    if working.num_bytes + BYTES_PER_FILE * len(working.files) < MAX_BYTES:
        return
    largest = sorted(working.files, key=lambda name: working.files[name], reverse=True)[:MAX_NAMES]
    named = ", ".join(f"{name} ({size(working.files[name])})" for name in largest)
    raise UserError(
        f"{where}: has {size(working.num_bytes)}, and Ray takes less than {size(MAX_BYTES)}; the largest files: {named}; "
        "leave files out with --exclude PATTERN or a .rayignore, and put data on storage that the cluster reads"
    )


def _hint(left_out: Sequence[str]) -> str:
    return f"; left out: {_some(left_out)}" if left_out else ""


def _some(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return f"{', '.join(names[:MAX_NAMES])}{f' and {more:,} more' if more > 0 else ''}"
