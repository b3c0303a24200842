"""Measure what evaluations beside training save: the same run with evaluations inline and beside, in turn.

    python -m tests.benchmarks.evaluation_beside --rounds 3

One rank under Ray with one CPU, so that a second CPU is spare in both. Prints the seconds between the first and the last log
line of training, and those of the whole command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.paths import ROOT

MODES = ("inline", "beside")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eval-every", default="11 steps")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            for mode in MODES:
                name = f"{mode}-{number}"
                found[mode].append(measure(Path(folder), name, mode, given.eval_every, given.set))
    print(f"{'':<8}{'training':>12}{'command':>12}{'last top-1':>12}   seconds; medians of {given.rounds}")
    for mode, rows in found.items():
        training, command, top1 = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{mode:<8}{training:12.2f}{command:12.1f}{top1:12.2%}   {[round(row[0], 2) for row in rows]}")


def measure(
    folder: Path, name: str, mode: str, eval_every: str, changes: list[str]
) -> tuple[float, float, float]:
    """Train once; return the seconds of training and of the command, and the last accuracy."""
    settings = ["train.threads=1", "train.figures=none", f"train.eval_every={eval_every}", *changes]
    command = [sys.executable, "-m", "resnet_dist", "train", str(ROOT / "jobs/digits.py"), "--cpu"]
    command += ["--workers", "1", "--name", name, "--set", f"train.evaluate={mode}"]
    begin = time.monotonic()
    subprocess.run(
        [*command, *(word for one in settings for word in ("--set", one))],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=400,
    )
    seconds = time.monotonic() - begin
    lines = (folder / f"output/runs/{name}/spool.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    times = [one["time_ms"] for one in entries if "train/loss" in one.get("metrics", {})]
    top1 = [one["metrics"]["eval/top1"] for one in entries if "eval/top1" in one.get("metrics", {})][-1]
    return (times[-1] - times[0]) / 1000, seconds, top1


if __name__ == "__main__":
    main()
