"""A run as a tracker has it, and what several of them have in common: pure values, read by `runs` and `ui`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from resnet_dist.runs.group_folder import GROUP_KINDS

TOP1, LOSS, SPEED = "eval/top1", "eval/loss", "perf/images_per_second"
TRAIN_LOSS, RATE = "train/loss", "train/lr"
IMAGES = "eval/worst images"  # The page shows the images of this name with a slider over the steps.
FIGURES_TAG = "resnet_dist.figures"  # the steps of the evaluations whose figures and images are there
GROUP_TAGS = tuple(kind.tag for kind in GROUP_KINDS)  # the tags with the name of what a run is part of
# The tags with the place of a run's folder, and with the key that both have.
FOLDER_TAG, KEY_TAG = "resnet_dist.folder", "resnet_dist.key"
# Names and texts: runs that differ in nothing else have the same recipe.
NOT_COMPARED = ("description", "name", "experiment")


@dataclass(frozen=True)
class LoggedRun:
    """One run, with the newest value of each metric."""

    run_id: str
    name: str
    experiment: str
    experiment_id: str
    state: str  # RUNNING, FINISHED, FAILED or KILLED
    start_ms: int | None = None
    end_ms: int | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    artifacts: str = ""  # the place of its files

    @property
    def folder(self) -> str | None:
        """The path or URL of its folder; None for the run of a study, and for those of other programs."""
        return self.tags.get(FOLDER_TAG)

    @property
    def is_group_run(self) -> bool:
        """Report whether this is the run of a study or a sweep, the parent of others, which trains nothing itself."""
        return bool(self.group) and self.folder is None

    @property
    def group(self) -> str:
        """The name of the study or the sweep that it belongs to; empty without one."""
        return next((self.tags[tag] for tag in GROUP_TAGS if self.tags.get(tag)), "")

    @property
    def image_steps(self) -> list[int]:
        """The steps whose most surely wrong images are there."""
        return steps_of(self.tags.get(FIGURES_TAG, ""))

    @property
    def key(self) -> str:
        return self.tags.get(KEY_TAG, "")

    @property
    def seconds(self) -> float | None:
        """The time from its first start to its end, or to now while it runs."""
        if self.start_ms is None:
            return None
        end = self.end_ms if self.end_ms is not None else time.time() * 1000
        return max(0.0, (end - self.start_ms) / 1000)


@dataclass(frozen=True)
class Point:
    """One value of a metric."""

    step: int
    value: float


def steps_of(text: str) -> list[int]:
    """Return the steps that a tag lists."""
    return [int(word) for word in text.split() if word.isdigit()]


def best_first(runs: Iterable[LoggedRun]) -> list[LoggedRun]:
    """Return runs by their newest top-1, then by their loss; those without an evaluation last, the newest first."""

    def rank(run: LoggedRun) -> tuple[bool, float, float, int]:
        top1, loss = run.metrics.get(TOP1), run.metrics.get(LOSS)
        return top1 is None, -(top1 or 0.0), loss if loss is not None else 0.0, -(run.start_ms or 0)

    return sorted(runs, key=rank)


def differing(runs: Sequence[LoggedRun]) -> dict[str, list[str | None]]:
    """Return the recipe fields in which runs differ, with the value of each run; None where it has no such field.

    A field that only other versions of this package have is no difference.
    """
    fields = dict.fromkeys(key for run in runs for key in run.params if key not in NOT_COMPARED)
    values = {key: [run.params.get(key) for run in runs] for key in fields}
    return {key: row for key, row in values.items() if len({value for value in row if value is not None}) > 1}
