"""Run the soak, and print its tables."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

from tests.benchmarks.soak.leftovers import left, left_files
from tests.benchmarks.soak.report import end_lines, fault_lines
from tests.benchmarks.soak.scene import LOG, UNDISTURBED, UNDISTURBED_LOG, Soak, soaking
from tests.benchmarks.soak.strike import strike_until_the_end
from tests.benchmarks.soak.usage import MB, disk_bytes, watched

UNDISTURBED_SECONDS = 3600.0
FLAGS = [
    # Two ranks always: then the end is bitwise that of the undisturbed run.
    *("--workers=2:2", "--max-restarts=1000", "--wait=600"),
    *("--set=model.name=resnet20", "--set=train.eval_every=200 steps", "--set=train.log_every=2 steps"),
    *("--set=train.checkpoint_every=20 steps", "--set=train.stall_timeout_seconds=30"),
]
say = partial(print, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0, help="for which faults strike")
    parser.add_argument("--steps", type=int, default=4000, help="of the run: more than it can take meanwhile")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--logs", type=Path, help="folder for the logs of both runs, and the samples of memory"
    )
    options = parser.parse_args()
    with soaking([*FLAGS, f"--set=train.length={options.steps} steps"]) as soak:
        try:
            run(soak, options)
        finally:
            if options.logs is not None:
                for name in (UNDISTURBED_LOG, LOG):
                    if (path := soak.scene.client.folder / name).exists():
                        shutil.copy(path, options.logs)


def run(soak: Soak, options: argparse.Namespace) -> None:
    hosts = [*soak.scene.ray_hosts, *soak.scene.servers]
    begin = time.monotonic()
    process = soak.scene.submit(UNDISTURBED, *soak.words, log=UNDISTURBED_LOG)
    assert process.wait(UNDISTURBED_SECONDS) == 0, soak.scene.client.output(UNDISTURBED_LOG)[-3000:]
    say(f"undisturbed: {options.steps} steps in {timedelta(seconds=round(time.monotonic() - begin))}")
    files, disk = left_files(soak), {host.name: disk_bytes(host) for host in hosts}
    begin = time.monotonic()
    samples = options.logs / "usage.jsonl" if options.logs is not None else None
    with watched(hosts, samples) as usage:
        strike_until_the_end(soak, options.seed, options.seconds)
    took = timedelta(seconds=round(time.monotonic() - begin))
    say(f"\nseed {options.seed}: {len(soak.struck)} faults in {took}, {options.steps} steps")
    parts: dict[str, Callable[[], object]] = {
        "faults": lambda: fault_lines(soak),
        "end": lambda: end_lines(soak),
        "usage": usage.lines,
        "disk": lambda: (
            f"{host.name}: {disk[host.name] / MB:.0f} → {disk_bytes(host) / MB:.0f} MB" for host in hosts
        ),
        "left": lambda: left(soak, files),
    }
    for title, lines in parts.items():
        say(f"\n{title}")
        for line in lines():  # type: ignore[attr-defined]
            say(line)


if __name__ == "__main__":
    main()
