"""Show a person the progress of a command: as a bar on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from queue import SimpleQueue
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


class LinePrinter:
    """Prints lines from a thread of its own.

    A terminal that Ctrl-S has stopped, or a pager at whose end nobody looks, blocks this thread and nobody else: the
    thread that reads a spool sends its metrics to MLflow too.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="print", daemon=True)
        self._thread.start()

    def print(self, text: str) -> None:
        self._lines.put(text)

    def close(self) -> None:
        """Wait until all lines are printed."""
        self._lines.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (text := self._lines.get()) is not None:
            with suppress(Exception):  # A line that cannot be shown must not cost the next.
                self._console.print(text)


class PlainReporter:
    """Prints a line for each entry of the spool; with `training` false, for evaluations and notes alone."""

    def __init__(self, show: Callable[[str], None], *, training: bool = True) -> None:
        self._show = show
        self._training = training
        self._total = 0

    def note(self, text: str) -> None:
        self._show(text)

    def begin(self, total_steps: int) -> None:
        self._total = total_steps

    def entry(self, entry: Entry) -> None:
        if entry.note:
            self.note(entry.note)
        elif entry.metrics and (self._training or "train/loss" not in entry.metrics):
            self.note(f"step {entry.step}/{self._total}  {describe(entry.metrics)}")


class BarReporter(PlainReporter):
    """Moves the bar for each training entry; prints evaluations and notes above it."""

    def __init__(self, show: Callable[[str], None], bar: Progress) -> None:
        super().__init__(show)
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
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with ExitStack() as stack:
        moves = can_move(console) if bar is None else bar
        progress = stack.enter_context(_progress(console, columns, REFRESHES_PER_SECOND)) if moves else None
        printer = stack.enter_context(closing(LinePrinter(console)))
        if progress is None:
            yield PlainReporter(printer.print, training=training_lines)
        else:
            yield BarReporter(printer.print, progress)


@contextmanager
def bars(
    console: Console, names: Sequence[str], unit: str
) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a function `(name, done, total)` that moves the bar of `name`; without a terminal, prints a line.

    total: None where it is unknown.
    """
    if not can_move(console):
        yield lambda name, done, total: console.print(
            f"{name}: {done:,}{'' if total is None else f' of {total:,}'} {unit}"
        )
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
