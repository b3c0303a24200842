"""`resnet-dist bench launch`: from the command to the first completed step, against a minimal program.

Both are processes of their own, started in turn. Ours is `train` as a person types it, on data and an MLflow
store that exist; the other (minimal.py) starts as many ranks, and takes a step of the same model on noise.
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
from pathlib import Path

from resnet_dist.bench import minimal
from resnet_dist.config import load_recipe
from resnet_dist.data.shards.index import read_index
from resnet_dist.driver.preflight import resolve_paths
from resnet_dist.runs.folder import RUN_FILE, SPOOL_FILE
from resnet_dist.system.cpus import cpu_count
from resnet_dist.tracking.spool import Follower

# Of our command: a run that ends soon after its first step, which it tells of at once.
OVERRIDES = (
    *("train.length=2 steps", "train.log_every=1 steps", "train.eval_every=0 steps"),
    "train.ema_every=1 steps",  # an average that moves less often than there are steps is refused
)
COMMAND = (sys.executable, "-c", "from resnet_dist.cli import main; main()", "train")
POLL_SECONDS = 0.01
MAX_SECONDS = 600.0  # for one start: what hangs is told, not waited for
STEP = "first step"

Milestones = Mapping[str, Callable[[], bool]]  # in order: what has been reached, and whether it has


class StartFailed(RuntimeError):
    """A start that ended, or took too long, before its first step."""


@dataclass(frozen=True)
class LaunchSpeed:
    """Seconds from the command to the first completed step, of every start."""

    ours: tuple[float, ...]
    minimal: tuple[float, ...]
    parts: dict[str, float]  # of ours, in order: medians

    @property
    def ratios(self) -> list[float]:
        """Ours over the minimal program's, of every pair."""
        return [ours / other for ours, other in zip(self.ours, self.minimal, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def bench_launch(recipe_file: Path, *, workers: int, local: bool, gpu: bool, rounds: int) -> LaunchSpeed:
    """`rounds` starts of each, in turn, after one of each that is not counted and prepares the data.

    Raises RecipeError for a bad recipe, StartFailed with the program's own words.
    """
    recipe = load_recipe(recipe_file)
    ranks = 0 if local else workers
    ours, other = [], []
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary)
        resolved = resolve_paths(recipe, output)
        for number in range(1 + rounds):
            ours.append(_start_ours(recipe_file, output, f"launch-{number}", ranks, gpu=gpu))
            program = [
                *(f"--model={recipe.model.name}", f"--image-size={recipe.data.image_size}"),
                *(f"--channels={recipe.data.channels}", f"--ranks={ranks}"),
                f"--classes={len(read_index(resolved.data.train).classes)}",
                f"--batch-size={recipe.data.global_batch_size // max(1, ranks)}",
                f"--cpus={max(cpu_count(), ranks)}",
                *(["--gpu"] if gpu else []),
            ]
            other.append(_start_minimal(program, output / f"minimal-{number}")[STEP])
    parts = {name: statistics.median(times[name] for times in ours[1:]) for name in ours[0]}
    lengths = [later - sooner for sooner, later in zip([0.0, *parts.values()], parts.values(), strict=False)]
    return LaunchSpeed(
        tuple(times[STEP] for times in ours[1:]),
        tuple(other[1:]),
        dict(zip(parts, lengths, strict=True)),
    )


def _start_ours(recipe: Path, output: Path, name: str, ranks: int, *, gpu: bool) -> dict[str, float]:
    words = [str(recipe), f"--output={output}", f"--name={name}", "--gpu" if gpu else "--cpu"]
    words += [f"--workers={ranks}"] if ranks else ["--local"]
    words += [word for override in OVERRIDES for word in ("--set", override)]
    run, log = output / "runs" / name, output / f"{name}.log"
    follower = Follower(run / SPOOL_FILE)
    milestones: dict[str, Callable[[], bool]] = {
        "imports and checks": lambda: log.stat().st_size > 0,  # it says that it starts Ray
        "Ray and MLflow": (run / RUN_FILE).exists,
        "ranks": (run / SPOOL_FILE).exists,
        STEP: lambda: any(entry.step == 1 for entry in follower.read()),
    }
    if not ranks:
        del milestones["imports and checks"]
        milestones = {"imports, checks, MLflow": milestones.pop("Ray and MLflow"), **milestones}
    return reach([*COMMAND, *words], milestones, log)


def _start_minimal(words: Sequence[str], folder: Path) -> dict[str, float]:
    """In a folder of its own, where no file of this package can take another module's place."""
    folder.mkdir()
    program, mark = folder / "minimal.py", folder / "mark"
    shutil.copy(minimal.__file__, program)
    command = [sys.executable, str(program), *words, f"--folder={folder}", f"--mark={mark}"]
    return reach(command, {STEP: mark.exists}, folder / "log")


def reach(command: Sequence[str], milestones: Milestones, log: Path) -> dict[str, float]:
    """Run `command` to its end: after how many seconds it reached each of `milestones`, one after the other.

    Its output goes to `log`. Raises StartFailed where it ends before the last one, or badly.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # Under `uv run`, Ray's hook starts workers through another `uv run`, in an uploaded folder. Ours sets it itself.
    environment["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    environment.pop("MLFLOW_TRACKING_URI", None)  # a bench has no business on a server
    environment.pop("RAY_ADDRESS", None)
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
