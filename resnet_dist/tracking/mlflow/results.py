"""Publish the rest of a run beside its metrics: its recipe, and its results when it has ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request_safe

from resnet_dist.config import Recipe
from resnet_dist.errors import StorageError
from resnet_dist.runs.page import DATA_FILE, PROFILE_FOLDER
from resnet_dist.system.redact import redact
from resnet_dist.tracking.mlflow.failure import explain
from resnet_dist.tracking.mlflow.logged.lookup import LAST, NAME, logged_of_run
from resnet_dist.tracking.mlflow.logged.reference import CheckpointModels, log_cards
from resnet_dist.tracking.mlflow.model import log_model
from resnet_dist.tracking.mlflow.page.inputs import failures_of, log_failures, log_page, log_profile
from resnet_dist.tracking.mlflow.registry import DoesNotLoad, register_logged
from resnet_dist.tracking.mlflow.run import LAST_MODEL_TAG, MODEL_TAG, MlflowRun
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.registration import Registration
from resnet_dist.tracking.spool import Follower, read_layers
from resnet_dist.train.checkpoint.folder import MANIFEST, MODEL_FILE, list_checkpoints, step_of
from resnet_dist.train.step.gradient_norms import GRADIENT_NORMS

RECIPE_FILE = "recipe.json"


class OutOfReach(Exception):
    """The artifacts lie on the server's machine, in a folder that this machine does not share."""


def log_recipe(run: MlflowRun, recipe: Recipe) -> None:
    """Log the recipe as a file. Raises OutOfReach where the server does not see it, and what the store raises."""
    run.log_text(recipe.public().to_json(), RECIPE_FILE)
    _check_server_sees(run, RECIPE_FILE)


def publish_results(
    run: MlflowRun,
    record: RunRecord,
    checkpoint: str | None,
    report: Callable[[str], None],
    *,
    recipe_logged: bool,
) -> list[str]:
    """Publish the gradient norms, and the model of `checkpoint` unless it is None or there already, and register it.

    Return what could not be published, in words; the reason is reported. recipe_logged: false tries that again first.
    """
    tasks: list[tuple[str, Callable[[], object]]] = []
    if record.recipe.train.log_checkpoints and _has(lambda: list_checkpoints(record.run.checkpoints)):
        tasks.append(("the checkpoints", lambda: _log_checkpoints(run, record, checkpoint)))
    if not recipe_logged:
        tasks.append(("the recipe file", lambda: log_recipe(run, record.recipe)))
        if _has(lambda: record.run.page.read(DATA_FILE)):
            tasks.append(("the data sets", lambda: log_page(run, record.run)))
    if _has(lambda: failures_of(record.run)):
        tasks.append(("the details of failures", lambda: log_failures(run, record.run)))
    if _has(lambda: record.run.storage.objects(PROFILE_FOLDER)):
        tasks.append(("the profile", lambda: log_profile(run, record.run)))
    if record.recipe.train.log_gradient_norms:
        tasks.append(("the gradient norms", lambda: _log_gradient_norms(run, record)))
    if checkpoint is not None:
        tasks.append(("the model", lambda: _log_models(run, record, checkpoint)))
    if checkpoint is not None and record.run.register:
        tasks.append((_registration_of(record), lambda: _register(run, record, report)))
    # Last: a figure that cannot be drawn must not cost the model.
    if checkpoint is not None and record.recipe.train.figures != "none":
        tasks.append(("the figures", lambda: _log_figures(run, record, report)))
    return _do(tasks, run, report)


def _do(
    tasks: Sequence[tuple[str, Callable[[], object]]], run: MlflowRun, report: Callable[[str], None]
) -> list[str]:
    """Do named tasks one after another; return the names of those that are not done, and report the reason."""
    left: list[str] = []
    for number, (name, task) in enumerate(tasks):
        try:
            task()
        except DoesNotLoad as error:  # Its own defect: the next tasks may do.
            left.append(name)
            report(f"{run.place} did not get {name}: {error}")
        except Exception as error:  # Training is over, and must not fail by it.
            # One reason for all: the next ones would wait for the same artifact store.
            unsent = [name for name, _ in tasks[number:]]
            report(f"{run.place} did not get {' and '.join(unsent)}: {_reason(run, error)}")
            return left + unsent
    return left


def _has(find: Callable[[], object]) -> bool:
    """Report whether the run's storage has something; where it does not answer, the task that needs it reports that."""
    try:
        return bool(find())
    except StorageError:
        return True


def results_of(record: RunRecord) -> list[str]:
    """Return the names of the results of a finished run, for one that cannot be published now."""
    registration = [_registration_of(record)] if record.run.register else []
    figures = ["the figures"] if record.recipe.train.figures != "none" else []
    profile = ["the profile"] if _has(lambda: record.run.storage.objects(PROFILE_FOLDER)) else []
    return [*profile, "the model", *registration, *figures]


def _registration_of(record: RunRecord) -> str:
    return f"the registration as {record.run.register}"


def _register(run: MlflowRun, record: RunRecord, report: Callable[[str], None]) -> None:
    logged = logged_of_run(run.client, run.client.get_run(run.run_id))
    text = register_logged(run.client, run.uri, logged, Registration.parse(record.run.register))
    report(f"registered as {text}")


def _log_gradient_norms(run: MlflowRun, record: RunRecord) -> None:
    norms = read_layers(record.run.spool, GRADIENT_NORMS)
    run.log_text(json.dumps(norms), f"{GRADIENT_NORMS}.json")


def _log_checkpoints(run: MlflowRun, record: RunRecord, checkpoint: str | None) -> None:
    """Show in MLflow which checkpoints the folder of the run has now; those that were shown before stay as they are.

    Those of which the whole models are logged next are left out.
    """
    models = CheckpointModels(record.run.location)
    models.add(Follower(record.run.spool).read())
    models.compare(record.run)
    if checkpoint is not None:
        models.leave_out(map(step_of, (checkpoint, list_checkpoints(record.run.checkpoints)[-1])))
    models.send(run)


def _log_figures(run: MlflowRun, record: RunRecord, report: Callable[[str], None]) -> None:
    # Here, because a run that begins must not wait for matplotlib.
    from resnet_dist.tracking.mlflow.page.figures import log_figures

    log_figures(run, record.run, report)


def _log_models(run: MlflowRun, record: RunRecord, checkpoint: str) -> None:
    """Log the model of the best checkpoint, that of the newest where it is another one, and the cards of the others."""
    _log_model(run, record, checkpoint, MODEL_TAG, NAME)
    newest = list_checkpoints(record.run.checkpoints)[-1]
    if newest != checkpoint:
        _log_model(run, record, newest, LAST_MODEL_TAG, LAST)
    if record.recipe.train.log_checkpoints:
        log_cards(run)


def _log_model(run: MlflowRun, record: RunRecord, checkpoint: str, tag: str, name: str) -> None:
    """Log the model of a checkpoint under a name, unless the tag of the run shows that this was done."""
    step = step_of(checkpoint)
    if run.client.get_run(run.run_id).data.tags.get(tag) == str(step):
        return
    entries = Follower(record.run.spool).read()
    metrics = {
        key: (value, entry.time_ms)
        for entry in entries
        if entry.step == step
        for key, value in entry.metrics.items()
    }
    folder = record.run.checkpoints.bundles(MANIFEST).fetch(checkpoint, [MODEL_FILE])
    log_model(run, folder, record.recipe, step, metrics, name)
    run.set_tags({tag: str(step)})


def _reason(run: MlflowRun, error: Exception) -> str:
    """Return why something was not put in the artifact store of the run, which is named."""
    if isinstance(error, (OutOfReach, StorageError)):
        return str(error)
    reason, place = explain(error, run.uri).reason, ""
    with suppress(Exception):
        place = f" (its artifact store is {redact(run.client.get_run(run.run_id).info.artifact_uri)})"
    return reason + place


def _check_server_sees(run: MlflowRun, name: str) -> None:
    """Raise OutOfReach where the artifact went to a folder of this machine that the server does not see.

    A server may name a path of its own machine as the place of artifacts; a client then writes to that path here.
    """
    uri = run.client.get_run(run.run_id).info.artifact_uri
    parts = urlsplit(uri)
    if not run.uri.startswith(("http://", "https://")) or parts.scheme not in ("", "file"):
        return
    listed = http_request_safe(
        get_default_host_creds(run.uri),
        "/api/2.0/mlflow/artifacts/list",
        "GET",
        params={"run_id": run.run_id},
    ).json()
    if name in [file.get("path") for file in listed.get("files", [])]:
        return
    here = Path(unquote(parts.path)) / name
    with suppress(OSError):  # Leave nothing where nobody looks for it.
        here.unlink()
        for folder in here.parents:
            folder.rmdir()
    raise OutOfReach(
        f"its artifacts lie in {unquote(parts.path)} on the server's machine, which this one does not share"
    )
