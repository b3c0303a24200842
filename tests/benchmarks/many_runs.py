"""The experiment page with many runs: the seconds from the server's answer to the first rows, in a real browser.

    python -m tests.benchmarks.many_runs --runs 100 [--output FOLDER]

The runs are made as this package logs them, with all parameters of a recipe, its metrics and its tags, but no run is trained.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param, RunTag

from resnet_dist.config import Recipe, load_recipe
from resnet_dist.driver.preflight import resolve_paths
from resnet_dist.tracking.logged_run import FOLDER_TAG, KEY_TAG
from tests.paths import ROOT

STEPS = range(10, 1010, 10)
MAX_BATCH = 1000  # metrics in a request
BEST = "best"  # the name of the best run, which must be seen first
MODELS = ("resnet20", "resnet32", "resnet56", "resnet110")
ROW_SECONDS = 60.0  # an upper limit for the first rows


def make_runs(output: Path, count: int) -> None:
    """Write the runs into the store of an output folder, as the uploader of this package does."""
    client = mlflow.MlflowClient(f"sqlite:///{output}/mlflow.db")
    name = "digits"
    found = client.get_experiment_by_name(name)
    location = (output / "artifacts" / name).absolute().as_uri()
    experiment = found.experiment_id if found else client.create_experiment(name, artifact_location=location)
    recipe = resolve_paths(load_recipe(ROOT / "jobs/digits.py"), output.absolute())
    draws = random.Random(0)
    for number in range(count):
        rate, model = 10 ** draws.uniform(-2, 0), draws.choice(MODELS)
        changed = recipe.with_overrides([f"optim.lr={rate:.4g}", f"model.name={model}"])
        top1 = 0.999 if number == 0 else 0.6 + 0.35 * draws.random()
        _make_run(client, experiment, BEST if number == 0 else f"digits-{number:03}", changed, top1, output)


def _make_run(
    client: mlflow.MlflowClient, experiment: str, name: str, recipe: Recipe, top1: float, output: Path
) -> None:
    run_id = client.create_run(experiment, run_name=name, tags={KEY_TAG: name}).info.run_id
    params = [Param(key, value[:6000]) for key, value in recipe.flat().items() if key != "description"]
    tags = {
        FOLDER_TAG: f"{output}/runs/{name}",
        "mlflow.source.name": "jobs/digits.py",
        "mlflow.user": "anna",
    }
    tags |= {
        "mlflow.note.content": recipe.description,
        "resnet_dist.not_default": json.dumps(recipe.not_default()),
    }
    client.log_batch(run_id, params=params[:100], tags=[RunTag(*pair) for pair in tags.items()])
    now, found = time.time_ns() // 1_000_000, list[Metric]()
    for step in STEPS:
        share = step / STEPS[-1]
        values = {
            "train/loss": 2.3 * math.exp(-4 * share * top1),
            "train/top1": top1 * share,
            "train/lr": 0.1 * (1 - share),
            "perf/images_per_second": 2000.0,
            "perf/step_seconds": 0.06,
            "perf/data_wait_seconds": 0.001,
            "perf/compute_seconds": 0.05,
            "data/bad_samples": 0.0,
            "system/cpu_percent": 50.0,
            "system/memory_percent": 20.0,
        }
        if step % 100 == 0:
            values |= {"eval/top1": top1 * share, "eval/top5": 1.0, "eval/loss": 1 - top1 * share}
        found += [Metric(key, value, now, step) for key, value in values.items()]
    for begin in range(0, len(found), MAX_BATCH):
        client.log_batch(run_id, metrics=found[begin : begin + MAX_BATCH])
    client.set_terminated(run_id)


@contextmanager
def served(output: Path) -> Iterator[list[str]]:
    """Serve the page by `resnet-dist ui`; yield its links once the server answers."""
    command = [
        sys.executable,
        "-m",
        "resnet_dist",
        "ui",
        "--output",
        str(output),
        "--port",
        str(_free_port()),
    ]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield [process.stdout.readline().split()[1] for _ in range(2)]
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


@contextmanager
def browser() -> Iterator[Any]:
    """Yield the system's Chromium. Raises FileNotFoundError without one."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise FileNotFoundError("no Chromium: `apt-get install chromium` brings one")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


def seconds_to_rows(opened: Any, link: str, width: int) -> float:
    """Return the seconds from the request of the page to its best run, in a fresh profile without a cache."""
    page = opened.new_page(viewport={"width": width, "height": 1000})
    begin = time.monotonic()
    page.goto(link, wait_until="commit")
    page.get_by_text(BEST, exact=True).first.wait_for(timeout=ROW_SECONDS * 1000)
    seconds = time.monotonic() - begin
    page.close()
    return seconds


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    output = options.output or Path(tempfile.mkdtemp())
    begin = time.monotonic()
    if not (output / "mlflow.db").exists():
        output.mkdir(exist_ok=True)
        make_runs(output, options.runs)
        print(f"{options.runs} runs made in {time.monotonic() - begin:.0f} s", flush=True)
    with served(output) as links, browser() as opened:
        for width in (1600, 1000):
            times = [seconds_to_rows(opened, links[0], width) for _ in range(options.repeats)]
            median = statistics.median(times)
            print(f"{width} px: first rows after {times[0]:.2f} s, later {median:.2f} s (median)", flush=True)


if __name__ == "__main__":
    main()
