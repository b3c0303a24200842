"""A file of rows that grows with the predictions, and is continued by the same command after an interruption.

NAME.partial holds the rows, and NAME.partial.json what they were made with. When all rows are there, the first gets its
name, so that a file called NAME is whole. A shard that could not be read has a row with its problem, from which on the
next command predicts again: the failure may have passed. .NAME.partial.lock keeps a second command away.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from resnet_dist.data.findings import BAD_IMAGE, BAD_SHARD, Findings
from resnet_dist.errors import StorageError, UserError
from resnet_dist.predict.rows import Form
from resnet_dist.predict.unread import Input
from resnet_dist.system.files import write_text_atomically
from resnet_dist.system.locks import LockHeld, hold_lock
from resnet_dist.train.checkpoint.load import TrainedModel

FORMS: dict[str, Form] = {".jsonl": "json", ".csv": "csv"}


def form_of_file(path: Path) -> Form:
    """Return the form of a file's rows by its name. Raises UserError where it has none, or the file exists."""
    if path.suffix not in FORMS:
        raise UserError(f"--to {path}: its name must end with {' or '.join(FORMS)}")
    _check_new(path)
    if not path.absolute().parent.is_dir():
        raise UserError(f"--to {path}: no such folder {path.absolute().parent}")
    return FORMS[path.suffix]


@dataclass
class RowFile:
    """The rows that are there, and room for more. Nothing is on the disk before the first row."""

    path: Path
    made: dict[str, object]  # the model and the options that the rows are made with
    done: list[tuple[str, str | None]]  # input and problem of each row that is there

    @classmethod
    @contextmanager
    def open(cls, path: Path, trained: TrainedModel, top_k: int) -> Iterator[Self]:
        """Open a new file, or one that was begun, and keep other commands from it until the end of the block.

        Raises UserError where another command writes it, or it was begun with another model or --top; StorageError
        where its folder cannot be written.
        """
        made: dict[str, object] = {"model": weights_of(trained), "top": top_k}
        with _held(path):
            _check_new(path)  # Another command may have finished it since.
            with _explained(path):
                opened = cls._begun(path, made)
            yield opened

    @classmethod
    def _begun(cls, path: Path, made: dict[str, object]) -> Self:
        partial = _partial(path)
        lines = _whole_lines(partial) if partial.exists() else []
        if not lines:
            partial.unlink(missing_ok=True)
            return cls(path, made, [])
        try:
            before = json.loads(_state(path).read_text("utf-8"))
            done = list(_rows(lines, FORMS[path.suffix]))
        except (OSError, ValueError, KeyError, IndexError):
            before, done = None, []
        if before != made:
            raise UserError(
                f"--to {path}: {partial.name} was begun with another model or --top; remove it, or give another name"
            )
        found = cls(path, made, done)
        if (
            first := next((n for n, (_, problem) in enumerate(done) if is_of_shard(problem)), None)
        ) is not None:
            found._cut(lines, first)
        return found

    def _cut(self, lines: list[str], num_rows: int) -> None:
        """Keep the first rows. The others, which follow a shard that could not be read, are predicted again."""
        kept = lines[: num_rows + (FORMS[self.path.suffix] == "csv")]
        with _partial(self.path).open("r+b") as file:
            file.truncate(len("".join(f"{line}\n" for line in kept).encode()))
        del self.done[num_rows:]

    @property
    def is_new(self) -> bool:
        return not _partial(self.path).exists()

    def write(self, text: str) -> None:
        """Append rows. Raises StorageError where the disk is full or the file cannot be written."""
        with _explained(self.path):
            if self.is_new:
                write_text_atomically(_state(self.path), json.dumps(self.made) + "\n")
            with _partial(self.path).open("a", encoding="utf-8", newline="") as file:
                file.write(text)

    def finish(self) -> None:
        """Give the file its name. Raises UserError where a file of that name has appeared."""
        _check_new(self.path)
        with _explained(self.path):
            _partial(self.path).replace(self.path)
        with suppress(OSError):
            _state(self.path).unlink()

    def rest(self, inputs: Iterable[Input], findings: Findings) -> Iterator[Input]:
        """Yield the inputs without a row; those with one are counted.

        Raises UserError where the rows are those of other inputs.
        """
        inputs = iter(inputs)
        for number, (name, problem) in enumerate(self.done, 1):
            given = next(inputs, None)
            if given is None or given.name != name:
                raise UserError(
                    f"--to {self.path}: row {number} of {_partial(self.path).name} is {name}, and the paths name "
                    f"{given.name if given else 'no more'}; give the same paths, or remove it"
                )
            if problem:
                findings.leave_out(name, BAD_IMAGE, problem)
            else:
                findings.used += 1
        yield from inputs


def is_of_shard(problem: str | None) -> bool:
    """Report whether the problem of a row is that of a whole shard."""
    return problem is not None and problem.startswith(f"{BAD_SHARD}: ")


def _check_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"--to {path}: exists already and is whole; give another name, or remove it")


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold the lock of a file of rows, and leave nothing of it. Raises UserError where another command has it."""
    lock = path.with_name(f".{path.name}.partial.lock")
    with ExitStack() as stack:
        try:
            with _explained(path):
                stack.enter_context(hold_lock(lock, 0))
        except LockHeld:
            raise UserError(
                f"--to {path}: another command writes {_partial(path).name}; wait for it, or give another name"
            ) from None
        try:
            yield
        finally:
            with suppress(OSError):  # before the release: afterwards it may be another command's
                lock.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"--to {path}: cannot be written: {error.strerror or error}; the same command resumes"
        ) from None


def weights_of(trained: TrainedModel) -> str:
    """Return the SHA-256 of the model's weights and of what determines the view of an image."""
    digest = hashlib.sha256(trained.recipe.data.model_dump_json().encode())
    for name, value in trained.model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _state(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial.json")


def _whole_lines(partial: Path) -> list[str]:
    """Return the lines of a file; a last one that was cut off is removed from the file."""
    content = partial.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with partial.open("r+b") as file:
            file.truncate(end)
    return content[:end].decode("utf-8").split("\n")[:-1]


def _rows(lines: list[str], form: Form) -> Iterator[tuple[str, str | None]]:
    if form == "json":
        for line in lines:
            row = json.loads(line)
            yield row["input"], row["problem"]
    else:
        for cells in csv.reader(lines[1:]):
            yield cells[0], cells[-1] or None
