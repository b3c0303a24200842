"""The folder of a study or a sweep, runs that belong together: what it records of their parent, its files, its runs.

OUTPUT/studies/NAME/   study.json  figure.png  runs.csv
OUTPUT/sweeps/NAME/    parent.json  sweep.json  figure.png  runs.csv
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RUNS_FOLDER, RunFolder, Status, read_run
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.system.command import sync_advice
from resnet_dist.system.files import write_text_atomically
from resnet_dist.system.locks import LockHeld, hold_lock

STUDIES_FOLDER, SWEEPS_FOLDER = "studies", "sweeps"  # in the output folder
STUDY_FILE, PARENT_FILE = "study.json", "parent.json"
FIGURE_FILE, TABLE_FILE, SWEEP_FILE = "figure.png", "runs.csv", "sweep.json"
LOCK_FILE, STOP_FILE = ".lock", ".stop"  # STOP_FILE: no trial of the sweep may begin any more
STUDY_TAG, SWEEP_TAG = "study", "sweep"  # the tag of a run with the name of its study, or of its sweep


class GroupHeld(UserError):
    """A study or a sweep that another process trains."""


@dataclass(frozen=True)
class GroupKind:
    """A kind of runs that belong together, and where it is kept."""

    word: str  # for messages
    folder: str  # of all of this kind, in the output folder
    record: str  # the file with what is known of the parent run
    tag: str  # of its runs, with its name
    files: tuple[str, ...]  # that MLflow gets


STUDY = GroupKind("study", STUDIES_FOLDER, STUDY_FILE, STUDY_TAG, (FIGURE_FILE, TABLE_FILE))
SWEEP = GroupKind("sweep", SWEEPS_FOLDER, PARENT_FILE, SWEEP_TAG, (FIGURE_FILE, TABLE_FILE, SWEEP_FILE))
GROUP_KINDS = (STUDY, SWEEP)


def kind_of(folder: Path) -> GroupKind:
    """Return the kind that a folder of an output is of, by the folder that it lies in."""
    return next((kind for kind in GROUP_KINDS if kind.folder == folder.parent.name), STUDY)


@dataclass(frozen=True)
class GroupFolder:
    """A study or a sweep and what is recorded of it. A value: nothing is on the disk before `write` or `held`."""

    path: Path
    key: str  # a unique tag in MLflow, by which a restarted driver finds the run that it had created
    run_id: str | None = None  # the id of the parent run in MLflow, once it exists there
    experiment: str | None = None  # None: an earlier version began the study
    description: str = ""
    source: str = ""  # the job or recipe file, as it was typed
    tracker: str | None = None  # see RunFolder.tracker
    status: Status | None = None  # None while it is trained, and where its driver died
    conclusion: str = ""
    unsent: tuple[str, ...] = ()  # what MLflow did not get, in words

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def kind(self) -> GroupKind:
        return kind_of(self.path)

    @property
    def title(self) -> str:
        """The words that messages name it by, such as "study NAME"."""
        return f"{self.kind.word} {self.name}"

    @property
    def output(self) -> Path:
        return self.path.parent.parent

    @property
    def files(self) -> list[Path]:
        """The figure, the table and the other files that MLflow gets, as far as there are results yet."""
        return [self.path / name for name in self.kind.files if (self.path / name).exists()]

    def runs(self) -> list[RunFolder]:
        """Return its runs that have begun."""
        place = open_storage(self.output).at(RUNS_FOLDER)
        names = (name for name in place.folders() if name.startswith(f"{self.name}-"))
        found = (read_run(place.at(name)) for name in names)
        return [run for run in found if run is not None and run.tags.get(self.kind.tag) == self.name]

    def ended(self, status: Status, conclusion: str, unsent: Sequence[str]) -> GroupFolder:
        return replace(self, status=status, conclusion=conclusion, unsent=tuple(unsent))

    def write(self) -> None:
        """Create or update the file that records it."""
        value = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "path"}
        self.path.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.path / self.kind.record, json.dumps(value, indent=1) + "\n")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of the study or sweep in `folder`, which is created.

    Raises GroupHeld where another process trains it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with hold_lock(folder / LOCK_FILE, 0):
            yield
    except LockHeld:
        raise GroupHeld(
            f"{kind_of(folder).word} {folder.name} is being trained by another process; wait for its end, or give another --name"
        ) from None


def read_group(folder: Path) -> GroupFolder | None:
    """Return the study or sweep in a folder; None where there is none.

    Raises UserError where its record cannot be parsed.
    """
    kind = kind_of(folder)
    file = folder / kind.record
    if not file.exists():
        return None
    try:
        value = json.loads(file.read_text())
        return GroupFolder(folder, **{**value, "unsent": tuple(value.get("unsent", ()))})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a {kind.word} ({error})") from None


def groups_in(output: Path) -> list[Path]:
    """Return the folders of the studies and the sweeps of an output folder, by kind and name."""
    return sorted(
        file.parent for kind in GROUP_KINDS for file in (output / kind.folder).glob(f"*/{kind.record}")
    )


def unsent_line(folder: Path, unsent: Sequence[str]) -> str:
    """Return the line about what MLflow did not get of the study or sweep in `folder`, with the command that sends it."""
    return f"not sent to MLflow: {', '.join(unsent)}; {sync_advice(folder.name, str(folder.parent.parent))}"
