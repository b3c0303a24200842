"""Values and names as MLflow takes them: longer ones are cut, and one that is refused does not block the others."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from mlflow.entities import Param, RunTag
from mlflow.exceptions import MlflowException

MAX_PER_REQUEST = 100  # parameters or tags
MAX_PARAM, MAX_TAG = 6000, 8000  # characters
MAX_OF_OLD_SERVERS = 500
MAX_FOLDER = 100
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Item = TypeVar("Item")


def params_of(fields: Mapping[str, object]) -> list[Param]:
    return [Param(key, cut(str(value), MAX_PARAM)) for key, value in fields.items()]


def tags_of(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(key, cut(value, MAX_TAG)) for key, value in tags.items()]


def cut(text: str, limit: int) -> str:
    """Return the text, or its beginning with … where it is longer than MLflow takes."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def shorter(item: Param | RunTag) -> Param | RunTag:
    """Return a parameter or tag as servers of earlier versions take it."""
    return type(item)(item.key, cut(item.value, MAX_OF_OLD_SERVERS))


def log_each(items: Sequence[Item], size: int, log: Callable[[list[Item]], None]) -> list[Item]:
    """Log items in requests of `size`; return those that the store refuses, each of which blocks its request.

    Raises what `log` raises for any other reason.
    """
    refused = []
    for low in range(0, len(items), size):
        batch = list(items[low : low + size])
        try:
            log(batch)
        except MlflowException as error:
            if not is_refusal(error):
                raise
            refused += batch if len(batch) == 1 else log_each(batch, 1, log)
    return refused


def is_refusal(error: MlflowException) -> bool:
    """Report whether the store refuses the values of a request, and would refuse them again."""
    # A database without a server answers so where a value does not fit its column.
    too_long = error.error_code == "BAD_REQUEST" and "DataError" in str(error)
    return error.error_code == "INVALID_PARAMETER_VALUE" or too_long


def folder_of(experiment: str) -> str:
    """Return the name of the folder for the artifacts of an experiment, whose name may hold slashes or be long."""
    if _PLAIN_NAME.fullmatch(experiment) and len(experiment) <= MAX_FOLDER:
        return experiment
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", experiment).strip("-.")[:MAX_FOLDER] or "experiment"
    return f"{plain}-{hashlib.sha256(experiment.encode()).hexdigest()[:8]}"
