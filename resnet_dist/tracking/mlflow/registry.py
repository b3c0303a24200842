"""Register a logged model under a name and an alias, once it has loaded in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from resnet_dist.errors import ExplainedError, UserError
from resnet_dist.system.redact import redact
from resnet_dist.tracking.mlflow.database.connect import connect
from resnet_dist.tracking.mlflow.database.relocate import relocate
from resnet_dist.tracking.mlflow.failure import explain
from resnet_dist.tracking.mlflow.logged import smoke
from resnet_dist.tracking.mlflow.logged.lookup import Logged, find_logged, quoted
from resnet_dist.tracking.mlflow.run import place_of
from resnet_dist.tracking.registration import FLAG, Registration
from resnet_dist.tracking.store import URI_VARIABLE, TrackerAway, is_database, sqlite_file, tracking_uri

SMOKE_SECONDS = 600.0  # limit for a process that downloads and loads a model
MAX_REASON = 300  # characters
VERSIONS_TAG = "mlflow.modelVersions"
EXISTS = ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS")


class DoesNotLoad(ExplainedError):
    """A logged model that does not load, or does not predict, in a process of its own: it is not registered."""


@dataclass(frozen=True)
class Candidate:
    """A model that a command registers after its work; it is found before, so that a mistake costs no work."""

    client: mlflow.MlflowClient
    uri: str
    logged: Logged
    registration: Registration

    @classmethod
    def find(cls, model: str, output: Path, registration: Registration) -> Candidate:
        """Return the model of a run, by name or id, or of a URI of MLflow.

        Raises UserError where MLflow does not have it, and TrackerAway where it does not answer.
        """
        uri = tracking_uri(output)
        file, name = sqlite_file(uri), f"{FLAG} {registration}: MODEL {model}"
        if Path(model).exists() or (file is not None and not file.exists()):
            raise UserError(f"{name} is no model that MLflow has; name a run or models:/NAME@ALIAS")
        try:
            client = connect(uri)
            relocate(uri, output)
            logged = find_logged(client, model)
            if logged.reference is not None:
                raise UserError(f"{name} is a checkpoint, of which MLflow has no files; name its run")
            return cls(client, uri, logged, registration)
        except UserError:
            raise
        except LookupError as missing:
            raise UserError(f"{name}: {missing}") from None
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise UserError(f"{name}: {explain(error, uri).reason}") from None
            raise _failed(error, uri) from None
        except Exception as error:  # The client of a server may raise any type.
            raise _failed(error, uri) from None

    def check_step(self, step: int) -> None:
        """Raise UserError where MLflow has the model of another step than the one that the command works with."""
        if self.logged.step not in (None, step):
            raise UserError(
                f"{FLAG} {self.registration}: MLflow has the model of step {self.logged.step}, and this one is of step "
                f"{step}; finish the run first"
            )

    def register(self) -> str:
        """Register the model; return its name, version and alias.

        Raises DoesNotLoad, UserError where the tracker refuses this person, TrackerAway.
        """
        try:
            return register_logged(self.client, self.uri, self.logged, self.registration)
        except ExplainedError:
            raise
        except Exception as error:
            raise _failed(error, self.uri) from None


def _failed(error: Exception, uri: str) -> ExplainedError:
    failure = explain(error, uri)
    return (UserError if failure.is_mistake else TrackerAway)(f"{place_of(uri)}: {failure.reason}")


def register_logged(client: mlflow.MlflowClient, uri: str, logged: Logged, registration: Registration) -> str:
    """Register a model of the store `uri`, unless it is already; return its name, version and alias.

    Repeating it changes nothing. Raises DoesNotLoad before anything is changed, and what the client raises.
    """
    name, alias = registration.name, registration.alias
    version = _version_of(client, name, logged)
    if version is None or (alias is not None and alias not in version.aliases):
        check_it_loads(logged.location, uri)
        version = version or _new_version(client, uri, name, logged)
        if alias is not None:
            client.set_registered_model_alias(name, alias, version.version)
    return f"{name} version {version.version}" + (f" (@{alias})" if alias else "")


def _new_version(client: mlflow.MlflowClient, uri: str, name: str, logged: Logged) -> ModelVersion:
    """Create a version, and the name where there is none yet; where that fails, it is as it was."""
    is_new = _create_name(client, name)
    try:
        return _create_version(client, uri, name, logged)
    except BaseException:
        if is_new:
            with suppress(Exception):
                client.delete_registered_model(name)
        raise


def check_it_loads(location: str, uri: str) -> None:
    """Raise DoesNotLoad unless the model at `location` loads and predicts in a process of its own, without pickles."""
    environment = {
        **os.environ,
        # In variables: everybody on this machine can read a command, which would show a password.
        URI_VARIABLE: uri,
        "MLFLOW_REGISTRY_URI": uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        # A GPU may be full of the model that was just trained.
        "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu",
    }
    # -P: the modules beside the program are none of its own.
    command = [sys.executable, "-P", str(smoke.__file__), location]
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SMOKE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = f"it has not loaded within {SMOKE_SECONDS:g} s"
    else:
        if done.returncode == 0:
            return
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = redact(lines[-1])[:MAX_REASON] if lines else f"its process ended with {done.returncode}"
    raise DoesNotLoad(f"the model does not load in a process of its own: {reason}; it was not registered")


def _create_name(client: mlflow.MlflowClient, name: str) -> bool:
    """Create a registered model; report whether it is new."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code not in EXISTS:
            raise
        return False
    return True


def _version_of(client: mlflow.MlflowClient, name: str, logged: Logged) -> ModelVersion | None:
    """Return the version of a registered model that is this model; None where there is none."""
    for found in client.search_model_versions(f"name = {quoted(name)}"):
        same_id = logged.model_id is not None and found.model_id == logged.model_id
        if found.status == "READY" and (same_id or found.source == logged.location):
            return client.get_model_version(name, found.version)  # A search leaves out the aliases.
    return None


def _create_version(client: mlflow.MlflowClient, uri: str, name: str, logged: Logged) -> ModelVersion:
    # A server takes a model by its id; a store without one would look for it where the environment points.
    if logged.model_id is not None and not is_database(uri):
        source = f"models:/{logged.model_id}"
        return client.create_model_version(name, source, logged.run_id, model_id=logged.model_id)
    version = client.create_model_version(name, logged.location, logged.run_id, model_id=logged.model_id)
    if (
        logged.model_id is not None
    ):  # The page of the model links its versions by this tag, which a server sets itself.
        versions = json.loads(client.get_logged_model(logged.model_id).tags.get(VERSIONS_TAG, "[]"))
        tag = json.dumps([*versions, {"name": name, "version": version.version}])
        client.set_logged_model_tags(logged.model_id, {VERSIONS_TAG: tag})
    return version
