"""The MLflow store of an output: the server or database that a variable names, or a file. Knows no MLflow."""

from __future__ import annotations

import os
import re
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlsplit

from resnet_dist.errors import NO_ANSWER_EXIT_CODE, ExplainedError, UserError
from resnet_dist.runs.storage.open import is_url
from resnet_dist.system.files import expanded
from resnet_dist.system.redact import HIDDEN, redact

URI_VARIABLE = "MLFLOW_TRACKING_URI"
STORE_FILE = "mlflow.db"  # the embedded store, in the output folder
ARTIFACTS_FOLDER = "artifacts"  # the folder of artifacts beside the embedded store
LOCAL_FOLDER = Path("output")  # holds the store of an output that is a URL
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # and with a driver, as postgresql+psycopg2
SCHEMES = ("http", "https", *DATABASES, "databricks", "databricks-uc", "uc")
MODEL_SCHEMES = ("models:/", "runs:/")  # the beginnings of MLflow's URIs of models
_HOST_AND_PORT = re.compile(r"([^/@\s]*@)?[A-Za-z0-9._-]+:\d+(/.*)?")


class TrackerRefuses(UserError):
    """A tracker that refuses this person, such as by a wrong password: it refuses every other request too."""


class TrackerAway(ExplainedError):
    """A tracker that does not answer, or not as MLflow does: another try may succeed."""

    exit_code = NO_ANSWER_EXIT_CODE


def store_folder(output: Path | str) -> Path:
    """Return the folder of the embedded store: the output itself, or a local one where the output is a URL."""
    return LOCAL_FOLDER.absolute() if is_url(output) else Path(output)


def store_note(output: Path | str) -> str | None:
    """Return one line for a run in a bucket without an MLflow server: its metrics stay on the driver's machine."""
    if not is_url(output) or os.environ.get(URI_VARIABLE):
        return None
    return (
        f"{URI_VARIABLE} is not set: MLflow's store is {store_folder(output) / STORE_FILE}, on this machine alone; the "
        "metrics are in the run's spool too"
    )


def tracking_uri(output: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or the URI of the store embedded in the output folder."""
    return _named() or f"sqlite:///{output.absolute() / STORE_FILE}"


def shown_tracker() -> str:
    """Return MLFLOW_TRACKING_URI without a password, as run.json keeps it; empty for the embedded store."""
    return _shown(_named())


def is_other_tracker(recorded: str | None) -> bool:
    """Report whether a run or study is kept in another tracker than the environment names; None: it is not recorded."""
    return recorded is not None and _without_slash(recorded) != shown_tracker()


def check_tracking_uri() -> None:
    """Raise UserError where MLFLOW_TRACKING_URI is no address of a server or database: a person's mistake."""
    uri = os.environ.get(URI_VARIABLE, "")
    advice = _mistake_in(uri) if uri else None
    if advice:
        raise UserError(f"{URI_VARIABLE}={_shown(uri)}: {advice}")


def is_database(uri: str) -> bool:
    """Report whether MLflow opens the store `uri` itself, without a server."""
    return urlsplit(uri).scheme.partition("+")[0] in DATABASES


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite store; None for every other store."""
    scheme, _, rest = uri.partition("://")
    return Path(rest.removeprefix("/").partition("?")[0]) if scheme.partition("+")[0] == "sqlite" else None


def has_password(uri: str) -> bool:
    """Report whether the URI holds a user name or password."""
    return _shown(uri) != uri


def without_password(uri: str) -> str:
    """Return the address of a server without user name and password, as a browser takes it."""
    return re.sub(r"(?<=://)[^/?#\s]*@", "", uri)


def _named() -> str:
    """Return MLFLOW_TRACKING_URI; empty where it is not set."""
    return _without_slash(os.environ.get(URI_VARIABLE, ""))


def _without_slash(uri: str) -> str:
    """Return the address of a server without slashes at its end: with and without, it is the same server."""
    return re.sub(r"(?<=[^:/])/+$", "", uri) if uri.startswith(("http://", "https://")) else uri


def _shown(uri: str) -> str:
    """Return the URI without a password, also where it has no scheme."""
    return redact(uri) if "://" in uri else re.sub(r".*@", f"{HIDDEN}@", uri)


def _mistake_in(uri: str) -> str | None:
    """Return what is wrong with a tracking URI and what to write, or None."""
    if uri != uri.strip(" \t\n'\""):
        return "leave out the quotes and spaces around the address"
    if uri == "databricks":
        return None
    if _HOST_AND_PORT.fullmatch(uri):
        return f"the address of a server begins with http:// or https://; write http://{_shown(uri)}"
    scheme, colon, rest = uri.partition(":")
    if not colon or scheme in ("file", ".") or "/" in scheme:
        folder = expanded(urlsplit(uri).path if scheme == "file" else uri).absolute()
        return (
            "MLflow keeps no runs in folders; write the address of a server, a file such as "
            f"sqlite:///{folder / STORE_FILE}, or leave the variable out for {STORE_FILE} in the output folder"
        )
    family = scheme.lower().partition("+")[0]
    if scheme in ("http", "https"):
        host = rest.removeprefix("//").rpartition("@")[2] if rest.startswith("//") else ""
        return None if host.strip("/") else f"no host is named; write {scheme}://HOST:PORT"
    if scheme == "postgres":
        return "write postgresql+psycopg2:// instead of postgres://"
    if family == "sqlite":
        path = rest.removeprefix("///")
        if not rest.startswith("///") or path in ("", ":memory:"):
            return "a file has three slashes before its path, four where the path is absolute: sqlite:////path/to/mlflow.db"
        return None
    if scheme.lower() in SCHEMES or family in DATABASES or _has_plugin(scheme):
        return None
    return (
        f"{scheme}: is no kind of address that MLflow knows; write http://HOST:PORT, https://…, sqlite:////path/to/"
        "mlflow.db or postgresql+psycopg2://…"
    )


def _has_plugin(scheme: str) -> bool:
    """Report whether an installed package adds this scheme to MLflow, as azureml-mlflow does."""
    return any(entry.name == scheme for entry in entry_points(group="mlflow.tracking_store"))
