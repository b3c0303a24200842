"""Find a logged model in a store by what a person calls it: a run by name or id, or a model by a URI of MLflow."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field, replace

import mlflow
from mlflow.entities import LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from resnet_dist.tracking.mlflow.failure import lacks_endpoint
from resnet_dist.tracking.mlflow.logged.reference import models_of, place_of_reference
from resnet_dist.tracking.mlflow.run import place_of
from resnet_dist.tracking.store import MODEL_SCHEMES

NAME = "model"  # of the one to load: the best, or the newest where no metric names one
LAST = "last"  # of the newest, where another one is the best
MODEL_URI = re.compile("models:/([^/@]+)(?:/([^/@]+)|@([^/@]+))?")  # a name, and a version or an alias
RUN_ID = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class Logged:
    """A model in a store: the place of its files, or of the checkpoint it refers to; and its ids where it has them."""

    location: str
    model_id: str | None = None  # None on a server that knows no models apart from runs
    run_id: str | None = None
    reference: str | None = None  # the checkpoint with the weights of a model that has no files
    step: int | None = field(default=None, compare=False)  # of its run, where the run names it


def find_logged(client: mlflow.MlflowClient, name: str) -> Logged:
    """Return a model by the id or name of its run, or as `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/ID/model`.

    MLflow would look names up in the store of its environment, whatever store it is given. Raises LookupError, or what
    the client raises.
    """
    if not name.startswith(MODEL_SCHEMES):
        return logged_of_run(client, run_of(client, name))
    if name.startswith("runs:/") and name.endswith(f"/{NAME}"):
        return logged_of_run(client, client.get_run(name.split("/")[1]))
    found = MODEL_URI.fullmatch(name)
    if found is None:
        return Logged(name)
    model, version, alias = found.groups()
    if alias:
        return _of_version(client, name, client.get_model_version_by_alias(model, alias))
    if version == "latest":
        versions = client.search_model_versions(f"name = {quoted(model)}")
        if not versions:
            raise LookupError(f"{place_of(client.tracking_uri)} has no version of {model}")
        version = str(max(int(one.version) for one in versions))
    if version:
        return _of_version(client, name, client.get_model_version(model, version))
    return _of_model(client.get_logged_model(model))


def run_of(client: mlflow.MlflowClient, name: str) -> Run:
    """Return the run with this id, or the newest with this name. Raises LookupError, or what the client raises."""
    if RUN_ID.fullmatch(name):
        return client.get_run(name)
    query = f"attributes.run_name = {quoted(name)}"
    experiments = [found.experiment_id for found in client.search_experiments()]
    runs = client.search_runs(experiments, query, order_by=["attributes.start_time DESC"], max_results=1)
    if not runs:
        raise LookupError(f"{place_of(client.tracking_uri)} has no run of that name")
    return runs[0]


def logged_of_run(client: mlflow.MlflowClient, run: Run) -> Logged:
    """Return the newest model of a run that has its weights. Raises LookupError where it has none."""
    outputs = run.outputs.model_outputs if run.outputs is not None else []
    steps = {output.model_id: output.step for output in outputs}
    models = [one for one in models_of(client, run.info.run_id) if one.name == NAME] if steps else []
    if models:
        newest = max(models, key=lambda model: steps.get(model.model_id, -1))
        return replace(_of_model(newest), step=steps.get(newest.model_id))
    # logged to a server that knows no models apart from runs
    if not _has_artifact(client, run.info.run_id):
        raise LookupError(f"run {run.info.run_name} has no model there; a run has one when it has finished")
    return Logged(f"{run.info.artifact_uri}/{NAME}", None, run.info.run_id)


def _has_artifact(client: mlflow.MlflowClient, run_id: str) -> bool:
    try:
        return bool(client.list_artifacts(run_id, NAME))
    except MlflowException as error:
        if lacks_endpoint(error):  # Listing asks for models apart from runs too.
            return True
        raise


def quoted(name: str) -> str:
    """Return a name for a filter of MLflow, which knows no escapes, but either kind of quotes."""
    quote = '"' if "'" in name else "'"
    return f"{quote}{name}{quote}"


def _of_model(model: LoggedModel) -> Logged:
    reference = place_of_reference(model)
    return Logged(str(model.artifact_location), model.model_id, model.source_run_id, reference=reference)


def _of_version(client: mlflow.MlflowClient, name: str, version: ModelVersion) -> Logged:
    """Return the model of a registered version, from where the registry has it."""
    source = client.get_model_version_download_uri(version.name, str(version.version))
    if source != name and source.startswith(MODEL_SCHEMES):
        return find_logged(client, source)
    if not version.model_id and version.run_id:  # A database keeps no id with a version.
        with suppress(LookupError, MlflowException):  # Its run was deleted.
            logged = logged_of_run(client, client.get_run(version.run_id))
            if logged.location == source:
                return logged
    return Logged(source, version.model_id or None, version.run_id or None)
