"""The address of a tracker: what is none is refused with what to write; a password is never in the answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.errors import UserError
from resnet_dist.tracking.store import (
    URI_VARIABLE,
    check_tracking_uri,
    has_password,
    is_other_tracker,
    shown_tracker,
    sqlite_file,
    tracking_uri,
    without_password,
)

MISTAKES = {
    "localhost:5000": "write http://localhost:5000",
    "mlflow.example.org:5000/path": "write http://mlflow.example.org:5000/path",
    "anna:hush@host:5000": "write http://***@host:5000",
    "./mlruns": "MLflow keeps no runs in folders",
    "mlruns": "MLflow keeps no runs in folders",
    "/srv/mlruns": "sqlite:////srv/mlruns/mlflow.db",
    "file:///srv/mlruns": "sqlite:////srv/mlruns/mlflow.db",
    "file:mlruns": "MLflow keeps no runs in folders",
    "http:/host": "write http://HOST:PORT",
    "http://": "write http://HOST:PORT",
    "https://anna:hush@": "write https://HOST:PORT",
    "'http://host:5000'": "leave out the quotes and spaces",
    " http://host:5000": "leave out the quotes and spaces",
    "ftp://anna:hush@host": "ftp: is no kind of address",
    "s3://bucket/mlflow": "s3: is no kind of address",
    "postgres://anna:hush@host/db": "write postgresql+psycopg2:// instead",
    "sqlite://mlflow.db": "three slashes",
    "sqlite:mlflow.db": "three slashes",
    "sqlite://": "three slashes",
    "sqlite:///:memory:": "three slashes",
    "anna:hush@host": "anna: is no kind of address",
}


@pytest.mark.parametrize("uri", MISTAKES)
def test_what_is_no_address_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI_VARIABLE, uri)
    with pytest.raises(UserError) as refused:
        check_tracking_uri()
    assert MISTAKES[uri] in str(refused.value)
    assert str(refused.value).startswith(f"{URI_VARIABLE}={shown_tracker()}: ")
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "https://anna:hush@host/path/",
        "sqlite:///mlflow.db",
        "sqlite:////srv/mlflow.db",
        "postgresql+psycopg2://anna:hush@host/db",
        "mysql+pymysql://host/db",
        "databricks",
        "databricks://profile",
    ],
)
def test_addresses_are_accepted(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI_VARIABLE, uri)
    check_tracking_uri()
    assert has_password(uri) == ("hush" in uri)
    assert "hush" not in shown_tracker()


def test_a_browser_gets_no_password() -> None:
    assert without_password("http://anna:hu@sh@host:5000/x") == "http://host:5000/x"


def test_the_file_of_a_store() -> None:
    assert sqlite_file("sqlite:////srv/mlflow.db") == Path("/srv/mlflow.db")
    assert sqlite_file("sqlite:///mlflow.db") == Path("mlflow.db")
    assert sqlite_file("http://host") is None


def test_a_slash_at_the_end_is_the_same_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI_VARIABLE, "https://host:5000/path//")
    assert tracking_uri(Path("x")) == shown_tracker() == "https://host:5000/path"
    assert [is_other_tracker(one) for one in ("https://host:5000/path/", "https://host:5000", "", None)] == [
        False,
        True,
        True,
        False,
    ]
    monkeypatch.setenv(URI_VARIABLE, "sqlite:////srv/mlflow.db")
    assert shown_tracker() == "sqlite:////srv/mlflow.db"
