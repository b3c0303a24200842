"""Measure training steps with one CPU thread against all of them, for nets whose steps have more and more work.

    python tests/benchmarks/threads.py [--busy N] [--rounds N]

Each setting is a forward and a backward pass on a batch in memory; thread counts take turns within each round. --busy:
processes that do nothing but use a CPU meanwhile. Set OMP_WAIT_POLICY or GOMP_SPINCOUNT to compare ways of waiting: they
are read when the process starts.

The printed work is what `train.start.threads` chooses by: multiplications of a forward pass per layer, in millions.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from resnet_dist.model import build_model
from resnet_dist.system.cpus import cpu_count
from resnet_dist.train.start.threads import work_per_layer

SETTINGS = [  # (model, channels, image size, batch size)
    ("resnet8", 1, 8, 64),
    ("resnet20", 1, 8, 64),
    ("resnet20", 1, 8, 256),
    ("resnet20", 3, 16, 64),
    ("resnet20", 3, 32, 32),
    ("resnet20", 3, 32, 64),
    ("resnet20", 3, 32, 128),
    ("resnet56", 3, 32, 128),
    ("resnet18", 3, 64, 32),
    ("resnet50", 3, 128, 16),
]
SECONDS = 1.0  # of each count of threads in each round


@contextmanager
def busy(count: int) -> Iterator[None]:
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="the first N settings alone")
    chosen = parser.parse_args(arguments)
    counts = (1, cpu_count())
    print(
        f"{'model':10}{'pixels':>7}{'batch':>6}{'work':>8}{'images/s':>10}{f'{counts[1]} threads':>11}   ratio, lowest to highest"
    )
    with busy(chosen.busy):
        for name, channels, size, batch in SETTINGS[: chosen.settings]:
            model = build_model(name, in_channels=channels, num_classes=10).to(
                memory_format=torch.channels_last
            )
            images = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
            labels = torch.zeros(batch, dtype=torch.long)
            speeds: dict[int, list[float]] = {count: [] for count in counts}
            for _ in range(chosen.rounds):
                for count in counts:
                    torch.set_num_threads(count)
                    speeds[count].append(batch * steps_per_second(model, images, labels))
            one, many = (statistics.median(speeds[count]) for count in counts)
            ratios = sorted(b / a for a, b in zip(*speeds.values(), strict=True))
            with torch.device("meta"):
                bare = build_model(name, in_channels=channels, num_classes=10)
            work = work_per_layer(bare, channels=channels, size=size, batch=batch) / 1e6
            print(
                f"{name:10}{size:7}{batch:6}{work:8.1f}{one:10,.0f}{many:11,.0f}   {statistics.median(ratios):.2f}, "
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                flush=True,
            )


def steps_per_second(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    steps = 0
    F.cross_entropy(model(images), labels).backward()  # warm-up
    begin = time.perf_counter()
    while (seconds := time.perf_counter() - begin) < SECONDS:
        F.cross_entropy(model(images), labels).backward()
        steps += 1
    return steps / seconds


if __name__ == "__main__":
    main()
