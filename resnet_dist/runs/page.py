"""The files of a run that its page in MLflow shows: data sets, their indexes, changes to the code, evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

PAGE_FOLDER = "page"  # in the run folder; all of it is published
DATA_FILE = "data.json"
CODE_FILE = "code.diff"
# Beside it: predictions of evaluations, from which the figures are made.
EVALUATIONS_FOLDER = "evaluations"
PROFILE_FOLDER = "profile"  # beside it too: traces of some steps
MAX_DIGEST = 36  # characters; MLflow's limit


@dataclass(frozen=True)
class DataSet:
    """A data set as an input of a run."""

    context: str  # train or eval
    name: str
    digest: str  # at most MAX_DIGEST characters
    location: str  # of the index, without a password
    source: str  # that the shards were prepared from; empty: not known
    samples: int
    classes: int
    shards: int

    @classmethod
    def to_json(cls, sets: Sequence[Self]) -> str:
        return json.dumps([asdict(one) for one in sets], indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: bytes) -> list[Self]:
        """Return the data sets that `to_json` has written. Raises ValueError or TypeError."""
        return [cls(**one) for one in json.loads(text)]


def predictions_file(step: int) -> str:
    """Return the name of the file with the predictions of an evaluation, in EVALUATIONS_FOLDER."""
    return f"step-{step:08d}.safetensors"


def step_of_predictions(name: str) -> int:
    """Return the step of a file that `predictions_file` names. Raises ValueError."""
    return int(name.removeprefix("step-").removesuffix(".safetensors"))


def index_file(context: str) -> str:
    """Return the name of the file with the index of a data set."""
    return f"data/{context}_index.json"
