"""Run the parts, each in a process of its own with a limit of its own; write results.json after every measurement."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # Before the copies are made: each would import it.

from tests.benchmarks.gpu import cifar, exact, fast, imagenet, repeat
from tests.benchmarks.gpu.setting import Results, Setting

# In order: name, the measurements, and the seconds for it. Those of the first questions come first.
PARTS: dict[str, tuple[Callable[[Setting], Results], float]] = {
    "exact": (exact.measure, 30),
    "repeat": (repeat.measure, 40),
    "fast": (fast.ours, 110),
    "airbench": (fast.theirs, 45),
    "imagenet": (imagenet.measure, 120),
    "resnet20": (cifar.resnet20, 75),
    "resnet56": (cifar.resnet56, 140),
}
NEEDS_CIFAR = ("fast", "airbench", "resnet20", "resnet56")
GRACE_SECONDS = 8.0  # for a part to end by itself before it is killed
END_SECONDS = 10.0  # of the whole call, for what remains to be written


def main() -> None:
    arguments = parse()
    setting = Setting(
        arguments.cifar,
        arguments.photographs,
        arguments.work or Path(tempfile.mkdtemp(prefix="resnet-dist-gpu-")),
        arguments.rehearse,
        0.0,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Written(arguments.out / "results.json", rehearsal=arguments.rehearse)
    end = time.monotonic() + 60 * arguments.minutes - END_SECONDS
    failed, chosen = list[str](), arguments.parts
    # Fewer parts get more time each: 50 seeds of two trainings take more than their share of a whole call.
    more = max(1.0, (end - time.monotonic()) / sum(PARTS[name][1] + GRACE_SECONDS for name in chosen))
    for name in chosen:
        if name in NEEDS_CIFAR and arguments.cifar is None:
            results.add(name, "left out", {"reason": "no --cifar"})
            continue
        limit = min(more * PARTS[name][1], end - time.monotonic() - GRACE_SECONDS)
        if limit <= 0:
            results.add(name, "left out", {"reason": "no time is left"})
            continue
        problem = run_part(name, replace(setting, deadline=time.monotonic() + limit), limit, results)
        if problem is not None:
            failed.append(name)
            results.add(name, "ended early", {"reason": problem})
    print(f"{results.path}: {len(results.parts)} parts, failed: {', '.join(failed) or 'none'}", flush=True)
    sys.exit(1 if failed else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "output/gpu")))
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--work", type=Path, help="keeps checkpoints: a later call resumes them")
    shared = f"some of {','.join(PARTS)}, which share the time; default: all"
    parser.add_argument("--parts", type=read_parts, default=list(PARTS), help=shared)
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes: measures nothing")
    return parser.parse_args()


def read_parts(text: str) -> list[str]:
    """Return the names in a list such as `fast,airbench`. Raises ArgumentTypeError where there is none, or one is no part."""
    names = [name.strip() for name in text.split(",")]
    wrong = next((name for name in names if name not in PARTS), None)
    if wrong is not None or len(set(names)) < len(names):
        reason = (
            "is named twice"
            if wrong is None
            else f"has {wrong!r}, which is no part"
            if wrong
            else "has an empty name"
        )
        raise argparse.ArgumentTypeError(f"{text!r} {reason}; use some of {','.join(PARTS)}")
    return names


class Written:
    """The results so far, in a file that is whole at every instant."""

    def __init__(self, path: Path, *, rehearsal: bool) -> None:
        self.path, self.parts = path, dict[str, dict[str, Any]]()
        self.head: dict[str, Any] = {
            "rehearsal": rehearsal,
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        self._write()

    def add(self, part: str, name: str, result: dict[str, Any]) -> None:
        if name == "device":
            self.head |= result
        else:
            self.parts.setdefault(part, {})[name] = result
            print(f"{part}: {name}: {json.dumps(result)}", flush=True)
        self._write()

    def _write(self) -> None:
        aside = self.path.with_suffix(".part")
        aside.write_text(json.dumps({**self.head, "parts": self.parts}, indent=1))
        aside.replace(self.path)


def run_part(name: str, setting: Setting, limit: float, results: Written) -> str | None:
    """Run a part in a copy of this process; return what ended it before its end, or None."""
    ours, child = multiprocessing.Pipe(duplex=False)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        ours.close()
        os._exit(carry_out(name, setting, child))
    child.close()
    kill_at, problem = time.monotonic() + limit + GRACE_SECONDS, None
    while problem is None:
        try:
            if ours.poll(max(0.0, kill_at - time.monotonic())):
                results.add(name, *ours.recv())
            else:
                os.kill(pid, signal.SIGKILL)
                problem = f"killed after {limit + GRACE_SECONDS:.0f} s"
        except EOFError:
            break
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return problem or (f"exit code {code}" if code else None)


def carry_out(name: str, setting: Setting, results: Connection) -> int:
    """Send the results of a part, in this process, which is its own; return the exit code."""
    try:
        if not setting.rehearsal:
            cuda = {"driver_cuda": torch.version.cuda, "device": torch.cuda.get_device_name()}
            results.send(("device", cuda))
        torch.manual_seed(0)
        for measured in PARTS[name][0](setting):
            results.send(measured)
        return 0
    except BaseException as error:
        traceback.print_exc()
        results.send(("error", {"error": f"{type(error).__name__}: {error}"}))
        return 1
    finally:
        sys.stdout.flush()


if __name__ == "__main__":
    main()
