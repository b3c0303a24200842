"""Show a person the progress of a command: as a bar on a terminal, as plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from resnet_dist.tracking.spool import Entry

# Refresh rarely: rich's default of ten takes 1.7 % of a core from the training on the same machine.
REFRESHES_PER_SECOND = 1


class PlainReporter:
    """Prints a line for each entry of the spool; with `training` false, for evaluations and notes alone."""

    def __init__(self, console: Console, *, training: bool = True) -> None:
        self._console = console
        self._training = training
        self._total = 0

    def note(self, text: str) -> None:
        self._console.print(text)

    def begin(self, total_steps: int) -> None:
        self._total = total_steps

    def entry(self, entry: Entry) -> None:
        if entry.note:
            self.note(entry.note)
        elif entry.metrics and (self._training or "train/loss" not in entry.metrics):
            self.note(f"step {entry.step}/{self._total}  {describe(entry.metrics)}")


class BarReporter(PlainReporter):
    """Moves the bar for each training entry; prints evaluations and notes above it."""

    def __init__(self, console: Console, bar: Progress) -> None:
        super().__init__(console)
        self._bar = bar
        self._task = bar.add_task("", total=None, visible=False, text="")

    def begin(self, total_steps: int) -> None:
        super().begin(total_steps)
        self._bar.update(self._task, total=total_steps, completed=0, visible=True, text="starting the ranks")

    def entry(self, entry: Entry) -> None:
        if "train/loss" in entry.metrics:
            self._bar.update(self._task, completed=entry.step, text=describe(entry.metrics))
        else:
            super().entry(entry)


@contextmanager
def make_reporter(console: Console, *, training_lines: bool = True) -> Iterator[PlainReporter]:
    """Yield a BarReporter where `console` is a terminal, a PlainReporter elsewhere.

    training_lines: false prints no plain line for a training entry; a bar shows it in any case.
    """
    if not console.is_terminal:
        yield PlainReporter(console, training=training_lines)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=REFRESHES_PER_SECOND) as bar:
        yield BarReporter(console, bar)


@contextmanager
def bars(console: Console, names: Sequence[str], unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function `(name, done, total)` that moves the bar of `name`; without a terminal, prints a line."""
    if not console.is_terminal:
        yield lambda name, done, total: console.print(f"{name}: {done:,} of {total:,} {unit}")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        tasks = {name: progress.add_task(name, total=None) for name in names}
        yield lambda name, done, total: progress.update(tasks[name], completed=done, total=total)


def describe(metrics: dict[str, float]) -> str:
    """Return the main metrics as one line of text; the others are left out."""
    shown = (
        ("train/loss", "loss {:.4f}"),
        ("train/top1", "top-1 {:.2%}"),
        ("perf/images_per_second", "{:,.0f} images/s"),
        ("eval/loss", "eval loss {:.4f}"),
        ("eval/top1", "eval top-1 {:.2%}"),
    )
    return "  ".join(form.format(metrics[key]) for key, form in shown if key in metrics)
