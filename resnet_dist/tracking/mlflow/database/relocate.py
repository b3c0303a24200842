"""Let the store of an output folder find its artifacts after the folder was moved: MLflow keeps absolute places."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from resnet_dist.tracking.store import ARTIFACTS_FOLDER, URI_VARIABLE, sqlite_file

# The columns that hold the place of artifacts as an absolute URI.
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def relocate(uri: str, output: Path) -> None:
    """Let the embedded store name the artifacts where they are, after its output folder was moved or renamed.

    MLflow keeps absolute places. They stay where the folder that they name is the same one, seen from elsewhere.
    """
    file = sqlite_file(uri)
    if os.environ.get(URI_VARIABLE) or file is None or not file.exists():
        return
    here = (output.absolute() / ARTIFACTS_FOLDER).as_uri()
    with closing(sqlite3.connect(file, timeout=20)) as database, database:
        rows = database.execute("select distinct artifact_location from experiments").fetchall()
        for before in {_artifacts_of(location or "") for (location,) in rows} - {None, here}:
            assert before is not None
            if _is_still_there(Path(unquote(urlsplit(before).path)), file):
                continue
            for table, column in LOCATIONS:
                with suppress(sqlite3.OperationalError):  # An earlier version of MLflow has no such column.
                    database.execute(
                        f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?",
                        (here, len(before) + 1, len(before) + 1, f"{before}/"),
                    )


def _is_still_there(artifacts: Path, file: Path) -> bool:
    """Report whether `artifacts` are those of the store in `file`: not gone, and not those of another store."""
    other = artifacts.with_name(file.name)
    # `file` is a copy, or a new store has taken its old place.
    if other.exists() and not other.samefile(file):
        return not file.with_name(artifacts.name).exists()
    return artifacts.exists()


def _artifacts_of(location: str) -> str | None:
    """Return the URI of the artifacts folder that an experiment's location is in; None where it has another form."""
    folder, separator, _ = location.rpartition(f"/{ARTIFACTS_FOLDER}/")
    return f"{folder}/{ARTIFACTS_FOLDER}" if separator and location.startswith("file://") else None
