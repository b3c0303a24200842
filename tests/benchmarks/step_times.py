"""Measure what timing the parts of a step costs, in microseconds and as a share of a step of a small net.

    python tests/benchmarks/step_times.py

The calls of one step are made around a backward pass of one number, in turn with such passes without them: in a real
step they would disappear in its noise. The share is that of a real step, of a ResNet-8 on 64 digits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from resnet_dist.model import build_model
from resnet_dist.train.state.step_times import StepTimes, step_times
from resnet_dist.train.step.train_step import queue_callback

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PASSES, ROUNDS = 200, 50


def backward(weight: torch.Tensor, times: StepTimes | None) -> None:
    if times is not None:
        times.begin(0.0)
    loss = weight * 2
    if times is not None:
        computed = times.computed
        loss.register_hook(lambda gradient: queue_callback(computed))
    loss.backward()
    if times is not None:
        times.synced()
        times.end()


def seconds_of(function: Callable[[], None], count: int) -> float:
    """Return the time of one call on the host, and on the device where that is longer."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


def main() -> None:
    torch.set_num_threads(1)
    weight, times = torch.ones((), device=DEVICE, requires_grad=True), step_times(DEVICE)
    costs = []
    for _ in range(ROUNDS):
        bare = seconds_of(lambda: backward(weight, None), PASSES)
        costs.append(seconds_of(lambda: backward(weight, times), PASSES) - bare)
    model = build_model("resnet8", in_channels=1, num_classes=10).to(DEVICE)
    images = torch.randn(64, 1, 8, 8, device=DEVICE)
    step = statistics.median(
        seconds_of(lambda: model(images).sum().backward(), 10) for _ in range(ROUNDS // 5)
    )
    cost = statistics.median(costs)
    print(f"{DEVICE}: {1e6 * cost:.1f} µs a step, {cost / step:.2%} of one of {1e3 * step:.2f} ms")


if __name__ == "__main__":
    main()
