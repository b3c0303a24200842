"""The folder of a study: what study.json records of it, its files, and its runs.

OUTPUT/studies/NAME/   study.json  figure.png  runs.csv
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

STUDIES_FOLDER = "studies"  # in the output folder
STUDY_FILE = "study.json"
FIGURE_FILE, TABLE_FILE = "figure.png", "runs.csv"
LOCK_FILE = ".lock"
STUDY_TAG = "study"  # the tag of a run with the name of its study


class StudyHeld(UserError):
    """A study that another process trains."""


@dataclass(frozen=True)
class StudyFolder:
    """A study and what its study.json records. A value: nothing is on the disk before `write` or `held`."""

    path: Path
    key: str  # a unique tag in MLflow, by which a restarted driver finds the run that it had created
    run_id: str | None = None  # the id of the parent run in MLflow, once it exists there
    experiment: str | None = None  # None: an earlier version began the study
    description: str = ""
    source: str = ""  # the job file, as it was typed
    tracker: str | None = None  # see RunFolder.tracker
    status: Status | None = None  # None while it is trained, and where its driver died
    conclusion: str = ""
    unsent: tuple[str, ...] = ()  # what MLflow did not get, in words

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def output(self) -> Path:
        return self.path.parent.parent

    @property
    def files(self) -> list[Path]:
        """The figure and the table, as far as there are results yet."""
        return [self.path / name for name in (FIGURE_FILE, TABLE_FILE) if (self.path / name).exists()]

    def runs(self) -> list[RunFolder]:
        """Return the runs of the study that have begun."""
        place = open_storage(self.output).at(RUNS_FOLDER)
        names = (name for name in place.folders() if name.startswith(f"{self.name}-"))
        found = (read_run(place.at(name)) for name in names)
        return [run for run in found if run is not None and run.tags.get(STUDY_TAG) == self.name]

    def ended(self, status: Status, conclusion: str, unsent: Sequence[str]) -> StudyFolder:
        return replace(self, status=status, conclusion=conclusion, unsent=tuple(unsent))

    def write(self) -> None:
        """Create or update study.json."""
        value = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "path"}
        self.path.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.path / STUDY_FILE, json.dumps(value, indent=1) + "\n")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of the study in `folder`, which is created. Raises StudyHeld where another process trains it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with hold_lock(folder / LOCK_FILE, 0):
            yield
    except LockHeld:
        raise StudyHeld(
            f"study {folder.name} is being trained by another process; wait for its end, or give another --name"
        ) from None


def read_study(folder: Path) -> StudyFolder | None:
    """Return the study in a folder; None where there is none.

    Raises UserError where study.json cannot be parsed.
    """
    file = folder / STUDY_FILE
    if not file.exists():
        return None
    try:
        value = json.loads(file.read_text())
        return StudyFolder(folder, **{**value, "unsent": tuple(value.get("unsent", ()))})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a study ({error})") from None


def studies_in(output: Path) -> list[Path]:
    """Return the folders of the studies of an output folder, by name."""
    return sorted(file.parent for file in (output / STUDIES_FOLDER).glob(f"*/{STUDY_FILE}"))


def unsent_line(folder: Path, unsent: Sequence[str]) -> str:
    """Return the line about what MLflow did not get of the study in `folder`, with the command that sends it."""
    return f"not sent to MLflow: {', '.join(unsent)}; {sync_advice(folder.name, str(folder.parent.parent))}"
