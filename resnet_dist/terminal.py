"""Show a person the progress of a command: as a bar on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from resnet_dist.system.redact import redact
from resnet_dist.system.streams import person_stream
from resnet_dist.tracking.spool import Entry

# Refresh rarely: rich's default of ten takes 1.7 % of a core from the training on the same machine.
REFRESHES_PER_SECOND = 1


class PersonConsole(Console):
    """A console on the person's stdout or stderr. It prints texts without the passwords and signatures of URLs.

    above: prints above the bar of that console while it shows one.
    """

    def __init__(self, *, stderr: bool = False, above: PersonConsole | None = None) -> None:
        super().__init__(stderr=stderr, soft_wrap=True, highlight=False, markup=False)
        self._above = above
        self.has_bar = False

    @property
    def file(self) -> IO[str]:
        return person_stream(stderr=self.stderr)

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        raise AttributeError("a console of the person has the person's stream")

    @property
    def encoding(self) -> str:
        return (getattr(self.file, "encoding", None) or "utf-8").lower()

    def print(self, *objects: Any, **options: Any) -> None:
        shown = [redact(item) if isinstance(item, str) else item for item in objects]
        if self._above is not None and self._above.has_bar and can_move(self):
            self._above.print(*shown, **options)
        else:
            super().print(*shown, **options)


def can_move(console: Console) -> bool:
    """Report whether a bar can be redrawn: not in a file, whatever FORCE_COLOR states, nor on a bare terminal."""
    return console.file.isatty() and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")


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
def make_reporter(
    console: Console, *, training_lines: bool = True, bar: bool | None = None
) -> Iterator[PlainReporter]:
    """Yield a BarReporter where `console` is a terminal, a PlainReporter elsewhere.

    training_lines: false prints no plain line for a training entry; a bar shows it in any case. bar: true or false
    decides without a look at the console.
    """
    if not (can_move(console) if bar is None else bar):
        yield PlainReporter(console, training=training_lines)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with _progress(console, columns, refresh_per_second=REFRESHES_PER_SECOND) as progress:
        yield BarReporter(console, progress)


@contextmanager
def bars(console: Console, names: Sequence[str], unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function `(name, done, total)` that moves the bar of `name`; without a terminal, prints a line."""
    if not can_move(console):
        yield lambda name, done, total: console.print(f"{name}: {done:,} of {total:,} {unit}")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with _progress(console, (*columns, TimeRemainingColumn())) as progress:
        tasks = {name: progress.add_task(name, total=None) for name in names}
        yield lambda name, done, total: progress.update(tasks[name], completed=done, total=total)


@contextmanager
def _progress(
    console: Console, columns: Sequence[ProgressColumn], refresh_per_second: float = 10
) -> Iterator[Progress]:
    with Progress(
        *columns,
        console=console,
        refresh_per_second=refresh_per_second,
        # Leave the process's own streams alone: what libraries write there belongs to the log.
        redirect_stdout=False,
        redirect_stderr=False,
    ) as progress:
        if not isinstance(console, PersonConsole):
            yield progress
            return
        console.has_bar = True
        try:
            yield progress
        finally:
            console.has_bar = False


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
