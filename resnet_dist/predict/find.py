"""The MODEL of a command line → the place of its weights: a folder, file, URL, run, or model of MLflow."""

from __future__ import annotations

import difflib
from pathlib import Path

from resnet_dist.config.part import NAME
from resnet_dist.data.storage.urls import local_path
from resnet_dist.errors import StorageError, UserError
from resnet_dist.runs.folder import CHECKPOINTS_FOLDER, RUN_FILE, RUNS_FOLDER
from resnet_dist.runs.storage.open import is_url, open_storage
from resnet_dist.runs.storage.protocol import Storage
from resnet_dist.tracking.open import check_tracker, has_mlflow
from resnet_dist.tracking.store import MODEL_SCHEMES, sqlite_file, store_folder, tracking_uri
from resnet_dist.train.checkpoint.folder import MANIFEST, best_or_newest

MLFLOW_FILE = "MLmodel"
ACCEPTED_MODELS = "a checkpoint, run or exported file by its path or URL, the name or id of a run, or models:/NAME@ALIAS of MLflow"


def find_model(model: str, output: str) -> Path | str:
    """Return the path or URL of a model; one that MLflow has is downloaded.

    output: the folder or URL with the runs, and with MLflow's store where no variable names another. Of a run that is
    named, it is the best checkpoint, or the newest where no metric names one. Raises UserError where there is none.
    """
    if model.startswith(MODEL_SCHEMES):
        return _download(model, output)
    if is_url(model):
        return model
    path, runs = local_path(model), open_storage(output).at(RUNS_FOLDER)
    # A run is often called as the folder of its images, which holds no model.
    is_other = not path.exists() or (path.is_dir() and not _holds_model(path))
    if is_other and NAME.fullmatch(model) and (found := _checkpoint_of(runs, model)) is not None:
        return found
    if path.exists():
        return _logged_in(path) if (path / MLFLOW_FILE).exists() else path
    return _download(model, output, _names(runs))


def _holds_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in (MLFLOW_FILE, MANIFEST, CHECKPOINTS_FOLDER))


def _logged_in(folder: Path) -> Path:
    """Return the checkpoint folder of a logged model that lies in a folder."""
    if not has_mlflow():
        return folder / "artifacts" / "checkpoint"
    from resnet_dist.tracking.mlflow.model import checkpoint_in

    return checkpoint_in(folder, str(folder))


def _checkpoint_of(runs: Storage, name: str) -> str | None:
    """Return the checkpoint of a run of this output; None where there is no such run, or it has none here."""
    run = runs.at(name)
    if run.read(RUN_FILE) is None:
        return None
    found = best_or_newest(run.at("checkpoints"))
    return None if found is None else f"{run.at('checkpoints').location}/{found}"


def _download(model: str, output: str, names: list[str] | None = None) -> Path | str:
    if not has_mlflow():
        raise UserError(f"{model!r} is no folder, and cannot be looked up, because MLflow is not installed")
    store = store_folder(output)
    check_tracker(store, "")
    uri = tracking_uri(store)
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise UserError(
            f"{model!r} is {_no_model(names)}, and there is no MLflow store at {file}; use {ACCEPTED_MODELS}"
        )
    from resnet_dist.tracking.mlflow.database.relocate import relocate
    from resnet_dist.tracking.mlflow.model import download_model

    relocate(uri, store)
    try:
        return download_model(model, uri)
    except LookupError as error:
        raise UserError(f"{model!r} is {_no_model(names)} ({error}){_nearest(model, names)}") from None


def _no_model(names: list[str] | None) -> str:
    return "no model of MLflow" if names is None else "neither a folder nor a run with a model"


def _names(runs: Storage) -> list[str]:
    try:
        return runs.folders()
    except StorageError:
        return []


def _nearest(model: str, names: list[str] | None) -> str:
    near = difflib.get_close_matches(model, names or [], n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
