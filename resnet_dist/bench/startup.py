"""`resnet-dist bench launch`: the time from the command to the first completed step, against a minimal program.

Both run as separate processes, in turn. Ours is the `train` command, with existing data and an existing MLflow
store. The other (minimal.py) starts as many ranks, and takes one step of the same model on noise.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from resnet_dist.bench import minimal
from resnet_dist.config import Recipe, load_recipe
from resnet_dist.data.shards.index import read_index
from resnet_dist.driver.preflight import resolve_paths
from resnet_dist.launch.on_ray.settings import ADDRESS_VARIABLE, UV_HOOK_VARIABLE
from resnet_dist.runs.folder import RUN_FILE, RUNS_FOLDER, SPOOL_FILE
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.system.cpus import cpu_count
from resnet_dist.tracking.spool import Follower
from resnet_dist.tracking.store import URI_VARIABLE

# Our command reports its first step at once, and ends soon after it.
OVERRIDES = (
    *("train.length=2 steps", "train.log_every=1 steps", "train.eval_every=0 steps"),
    "train.ema_every=1 steps",  # A recipe that averages less often than it has steps would be refused.
)
COMMAND = (sys.executable, "-c", "from resnet_dist.cli import main; main()", "train")
POLL_SECONDS = 0.01
MAX_SECONDS = 600.0  # for one start: a program that hangs is reported as failed
STEP = "first step"

# In order: the name of each milestone, and a function that reports whether it is reached.
Milestones = Mapping[str, Callable[[], bool]]


class StartFailed(RuntimeError):
    """Raised where a program fails, ends early, or takes too long."""


@dataclass(frozen=True)
class LaunchSpeed:
    """Seconds from the command to the first completed step, for every start."""

    ours: tuple[float, ...]
    minimal: tuple[float, ...]
    parts: dict[str, float]  # median seconds of the parts of our start, in order

    @property
    def ratios(self) -> list[float]:
        """Our seconds over the minimal program's, for every pair of starts."""
        return [ours / other for ours, other in zip(self.ours, self.minimal, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def bench_launch(recipe_file: Path, *, workers: int, local: bool, gpu: bool, rounds: int) -> LaunchSpeed:
    """Time `rounds` starts of each program, in turn, after one of each that prepares the data and is not counted.

    Raises RecipeError for a bad recipe, StartFailed with the program's output.
    """
    recipe = load_recipe(recipe_file)
    ranks = 0 if local else workers
    ours, other = [], []
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary)
        resolved = resolve_paths(recipe, output)
        for number in range(1 + rounds):
            ours.append(_start_ours(recipe_file, output, f"launch-{number}", ranks, gpu=gpu))
            arguments = _minimal_arguments(resolved, ranks, gpu=gpu)
            other.append(_start_minimal(arguments, output / f"minimal-{number}")[STEP])
    reached = {name: statistics.median(times[name] for times in ours[1:]) for name in ours[0]}
    seconds = [end - begin for begin, end in pairwise([0.0, *reached.values()])]
    return LaunchSpeed(
        tuple(times[STEP] for times in ours[1:]),
        tuple(other[1:]),
        dict(zip(reached, seconds, strict=True)),
    )


def _start_ours(recipe: Path, output: Path, name: str, ranks: int, *, gpu: bool) -> dict[str, float]:
    arguments = [str(recipe), f"--output={output}", f"--name={name}", "--gpu" if gpu else "--cpu"]
    arguments += [f"--workers={ranks}"] if ranks else ["--local"]
    arguments += [f"--set={override}" for override in OVERRIDES]
    run, log = output / RUNS_FOLDER / name, output / f"{name}.log"
    follower = Follower(open_storage(run).log(SPOOL_FILE))
    milestones: dict[str, Callable[[], bool]] = {
        "imports and checks": lambda: log.stat().st_size > 0,  # The first line reports that Ray is starting.
        "Ray and MLflow": (run / RUN_FILE).exists,
        "ranks": (run / SPOOL_FILE).exists,
        STEP: lambda: any(entry.step == 1 for entry in follower.read()),
    }
    if not ranks:
        # Without Ray there is no such line, so the first two parts are one.
        del milestones["imports and checks"]
        milestones = {"imports, checks, MLflow": milestones.pop("Ray and MLflow"), **milestones}
    return reach([*COMMAND, *arguments], milestones, log)


def _minimal_arguments(recipe: Recipe, ranks: int, *, gpu: bool) -> list[str]:
    """Return the arguments of minimal.py that make its step as large as that of `recipe`."""
    return [
        *(f"--model={recipe.model.name}", f"--image-size={recipe.data.image_size}"),
        *(f"--channels={recipe.data.channels}", f"--ranks={ranks}"),
        f"--classes={len(read_index(recipe.data.train).classes)}",
        f"--batch-size={recipe.data.global_batch_size // max(1, ranks)}",
        f"--cpus={max(cpu_count(), ranks)}",
        *(["--gpu"] if gpu else []),
    ]


def _start_minimal(arguments: Sequence[str], folder: Path) -> dict[str, float]:
    """Run a copy of minimal.py in its own folder: beside it, files of this package could shadow other modules."""
    folder.mkdir()
    program, mark = folder / "minimal.py", folder / "mark"
    shutil.copy(minimal.__file__, program)
    command = [sys.executable, str(program), *arguments, f"--folder={folder}", f"--mark={mark}"]
    return reach(command, {STEP: mark.exists}, folder / "log")


def reach(command: Sequence[str], milestones: Milestones, log: Path) -> dict[str, float]:
    """Run `command` to its end, and return the seconds after which it reached each of `milestones`, in order.

    Its output goes to `log`. Raises StartFailed where it ends before the last milestone, takes more than MAX_SECONDS,
    or exits with an error.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # Switch off Ray's hook for `uv run`, as our command does itself: for the other program it would start workers
    # through another `uv run`, in an uploaded folder.
    environment[UV_HOOK_VARIABLE] = "0"
    environment.pop(URI_VARIABLE, None)  # A bench must not write to the user's server.
    environment.pop(ADDRESS_VARIABLE, None)  # Both programs start a cluster of their own.
    times: dict[str, float] = {}
    with log.open("wb") as file:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            for name, reached in milestones.items():
                while not reached():
                    if process.poll() is not None and not reached():
                        raise StartFailed(f"ended before its {name}:\n{log.read_text()}")
                    if time.monotonic() - start > MAX_SECONDS:
                        raise StartFailed(f"no {name} after {MAX_SECONDS:.0f} s:\n{log.read_text()}")
                    time.sleep(POLL_SECONDS)
                times[name] = time.monotonic() - start
            if process.wait(timeout=MAX_SECONDS) != 0:
                raise StartFailed(f"ended with code {process.returncode}:\n{log.read_text()}")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return times
