"""The result of an evaluation as files: its numbers as JSON, and the figures of its predictions."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from resnet_dist.data.images.corruptions.table import DIFFERENCES
from resnet_dist.data.storage.urls import shown
from resnet_dist.errors import StorageError, UserError
from resnet_dist.evaluation.job import EvaluationTask
from resnet_dist.evaluation.run import Result
from resnet_dist.figures.files import evaluation_files

RESULT_FILE = "evaluation.json"
MAX_CLASSES = 5_000  # of a matrix that is drawn: it takes 200 MB, a few times over


def files_of(job: EvaluationTask, result: Result) -> dict[str, bytes]:
    """Return the files of a result by name: the numbers, and the figures where the job has kept predictions."""
    files = {RESULT_FILE: (json.dumps(_numbers(job, result), indent=1, ensure_ascii=False) + "\n").encode()}
    if result.predictions is not None and len(job.trained.classes) <= MAX_CLASSES:
        files |= evaluation_files(result.predictions, job.trained.classes, job.trained.step)
    return files


def check_folder(folder: Path) -> None:
    """Raise UserError where a result cannot become this folder: it must be new, in a folder that is there."""
    if folder.exists():
        raise UserError(f"--out {folder}: exists already; give another name, or remove it")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"--out {folder}: no such folder {folder.absolute().parent}")


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files to a new folder, which appears whole. Raises StorageError."""
    try:
        partial = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise StorageError(f"--out {folder}: cannot be written: {error.strerror or error}") from None
    try:
        for name, content in files.items():
            (partial / name).write_bytes(content)
        partial.chmod(0o755)  # A temporary folder is its owner's alone.
        os.rename(partial, folder)
    except OSError as error:
        raise StorageError(f"--out {folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _numbers(job: EvaluationTask, result: Result) -> dict[str, Any]:
    trained = job.trained
    found: dict[str, Any] = {
        "model": shown(trained.location),
        "step": trained.step,
        "shards": shown(job.shards),
        "precision": job.precision,
        "metrics": result.metrics,
        "bad": result.bad,
    }
    if result.top1:
        names = dict.fromkeys(condition.corruption for condition in result.top1)
        found["top1_by_severity"] = {
            name: {str(c.severity): value for c, value in result.top1.items() if c.corruption == name}
            for name in names
        }
        found["corruptions"] = DIFFERENCES
    return found
