"""Log the data sets of a run as its inputs, and the files that its storage keeps for the page."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.exceptions import MlflowException

from resnet_dist.runs.folder import FAILURES_FOLDER, RunFolder
from resnet_dist.runs.page import DATA_FILE, PROFILE_FOLDER, DataSet
from resnet_dist.runs.storage.protocol import Storage
from resnet_dist.tracking.mlflow.failure import lacks_endpoint
from resnet_dist.tracking.mlflow.run import MlflowRun

CONTEXT_TAG = "mlflow.data.context"  # The page shows it beside the name.
MAX_NAME, MAX_TAG = 500, 500  # characters; MLflow's limits
MAX_FAILURES = 20  # files of the newest ones


def log_page(run: MlflowRun, folder: RunFolder) -> None:
    """Log the data sets of a run and the files of its page. Raises what the store and the storage raise.

    Repeating it changes nothing. A run of an earlier version has none of them.
    """
    page = folder.page
    if (text := page.read(DATA_FILE)) is not None:
        log_data_sets(run, DataSet.from_json(text))
    run.log_files(_contents(page, [found.name for found in page.objects()]))


def log_failures(run: MlflowRun, folder: RunFolder) -> None:
    """Log what is known of the failures of a run."""
    run.log_files(_contents(folder.storage, failures_of(folder)))


def log_profile(run: MlflowRun, folder: RunFolder) -> None:
    """Log the traces of steps, one file at a time, for they may be large."""
    for found in folder.storage.objects(PROFILE_FOLDER):
        run.log_files(_contents(folder.storage, [found.name]))


def failures_of(folder: RunFolder) -> list[str]:
    return [found.name for found in folder.storage.objects(FAILURES_FOLDER)][-MAX_FAILURES:]


def log_data_sets(run: MlflowRun, sets: Sequence[DataSet]) -> None:
    """Log data sets as inputs; a server of an earlier MLflow, which has no inputs, gets their file alone."""
    inputs = [DatasetInput(_dataset(one), [*_tags(one)]) for one in sets]
    try:
        run.client.log_inputs(run.run_id, inputs)
    except MlflowException as error:
        if not lacks_endpoint(error):
            raise


def _dataset(one: DataSet) -> Dataset:
    scheme = one.location.partition("://")[0] if "://" in one.location else "local"
    profile = {"num_samples": one.samples, "num_classes": one.classes, "num_shards": one.shards}
    return Dataset(
        name=one.name[-MAX_NAME:],
        digest=one.digest,
        source_type=scheme,
        source=json.dumps({"uri": one.location, "prepared_from": one.source}, ensure_ascii=False),
        profile=json.dumps(profile),
    )


def _tags(one: DataSet) -> list[InputTag]:
    counts = {"samples": str(one.samples), "classes": str(one.classes), "source": one.source[:MAX_TAG]}
    return [InputTag(CONTEXT_TAG, one.context), *(InputTag(*item) for item in counts.items() if item[1])]


def _contents(storage: Storage, names: Sequence[str]) -> dict[str, bytes]:
    read = {name: storage.read(name) for name in names}
    return {name: content for name, content in read.items() if content is not None}
