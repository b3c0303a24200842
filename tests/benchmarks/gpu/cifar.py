"""cifar10_resnet at full length on one GPU, against the paper's table 6."""

from __future__ import annotations

import time

from resnet_dist.train.loop import train
from resnet_dist.train.tracker import NullTracker
from tests.benchmarks.gpu.setting import Results, Setting

# Percent, He et al. 2015, table 6; for 110 layers the mean of five runs, of which the best has 6.43.
PAPER_ERROR = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.61}


class Printer(NullTracker):
    """A Tracker that prints metrics and notes."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        shown = ("train/loss", "train/top1", "eval/top1", "perf/images_per_second")
        print(
            f"step {step}", {name: round(metrics[name], 4) for name in shown if name in metrics}, flush=True
        )

    def note(self, text: str) -> None:
        print(text, flush=True)


def resnet20(setting: Setting) -> Results:
    yield from at_full_length(setting, 20)


def resnet56(setting: Setting) -> Results:
    yield from at_full_length(setting, 56)


def at_full_length(setting: Setting, depth: int) -> Results:
    """Train all 64,000 steps, or as many as there is time for; a later call in the same folder resumes."""
    recipe = setting.recipe(
        "cifar10_resnet",
        [
            *([] if setting.rehearsal else [f"model.name=resnet{depth}", "train.compile=reduce-overhead"]),
            *("data.cache=device", "data.micro_batch_size=128", "train.precision=bf16"),
            *(["data.global_batch_size=128", "train.length=4 steps"] if setting.rehearsal else []),
            *("train.eval_every=40 epochs", "train.checkpoint_every=0 steps", "train.log_every=2000 steps"),
        ],
        setting.cifar,
    )
    start = time.monotonic()
    outcome = train(
        recipe, setting.work / f"cifar-{depth}", setting.world, Printer(), lambda: setting.is_over(5)
    )
    seconds = time.monotonic() - start
    found = {
        "steps": outcome.step,
        "of": outcome.total_steps,
        "seconds": round(seconds, 1),
        "finished": outcome.finished,
    }
    if "eval/top1" in outcome.metrics:
        found["error_percent"] = 100 * (1 - outcome.metrics["eval/top1"])
    yield f"resnet{depth}", {**found, "paper_error_percent": PAPER_ERROR[depth], "n": 1}
