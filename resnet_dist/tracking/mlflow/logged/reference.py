"""Checkpoints as models of MLflow: their step, metrics and place; the weights stay where the training wrote them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException

from resnet_dist.runs.folder import CHECKPOINTS_FOLDER, RunFolder, checkpoint_name
from resnet_dist.system.redact import redact
from resnet_dist.tracking.mlflow.failure import lacks_endpoint
from resnet_dist.tracking.mlflow.logged.kept import Checkpoints, KeptCheckpoint
from resnet_dist.tracking.mlflow.run import MlflowRun
from resnet_dist.tracking.mlflow.values import is_refusal
from resnet_dist.tracking.origin import NOTE_TAG
from resnet_dist.tracking.spool import Entry

TYPE = "checkpoint"  # the type of these models, by which a search finds them
STEP_TAG, PLACE_TAG, CHECKSUM_TAG, REMOVED_TAG = (
    f"resnet_dist.checkpoint{name}" for name in ("", ".location", ".sha256", ".removed")
)
CARD = "README.md"  # the one file of such a model


class CheckpointModels:
    """The models of a run's checkpoints, sent after the metrics of its spool. See backlog.Companion."""

    def __init__(self, location: str) -> None:
        self._location = location
        self.start_over()

    def start_over(self) -> None:
        self._checkpoints = Checkpoints()
        self._changed = set[int]()

    def add(self, entries: Sequence[Entry]) -> None:
        self._changed |= self._checkpoints.add(entries)

    def compare(self, run: RunFolder) -> None:
        """Take what the folder of the run has, and the spool has not."""
        self._changed |= self._checkpoints.compare(run)

    def leave_out(self, steps: Iterable[int]) -> None:
        """Send nothing of the checkpoints of these steps."""
        self._changed -= set(steps)

    def send(self, store: MlflowRun) -> None:
        changed = sorted(self._changed)
        log_references(store, self._location, [self._checkpoints.by_step[step] for step in changed])
        self._changed -= set(changed)

    def __len__(self) -> int:
        return len(self._changed)


def log_references(run: MlflowRun, location: str, checkpoints: Iterable[KeptCheckpoint]) -> None:
    """Show checkpoints of the run at `location` as models; repeating it changes nothing.

    A server without such models shows none. Raises what the store raises.
    """
    wanted = list(checkpoints)
    if not wanted:
        return
    try:
        known = {model.tags.get(STEP_TAG): model for model in models_of(run.client, run.run_id)}
        for one in wanted:
            _log(run, location, one, known.get(str(one.step)))
    except MlflowException as error:
        if lacks_endpoint(error):
            return
        if not is_refusal(error):
            raise
        run.refused.append(f"the models of checkpoints ({error.message})")


def log_cards(run: MlflowRun) -> None:
    """Log the description of each checkpoint that is still there as the file of its model. Raises what the store raises."""
    for model in models_of(run.client, run.run_id):
        if model.model_type != TYPE or REMOVED_TAG in model.tags:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / CARD
            path.write_text(f"# {model.name}\n\n{model.tags[NOTE_TAG]}\n", encoding="utf-8")
            run.client.log_model_artifacts(model.model_id, folder)


def models_of(client: mlflow.MlflowClient, run_id: str) -> list[LoggedModel]:
    """Return the models of a run, the newest first; none where the server knows no models."""
    experiment = client.get_run(run_id).info.experiment_id
    found: list[LoggedModel] = []
    token = None
    try:
        while True:
            page = client.search_logged_models([experiment], f"source_run_id = '{run_id}'", page_token=token)
            found += page
            token = page.token
            if not token:
                return found
    except MlflowException as error:
        if lacks_endpoint(error):
            return []
        raise


def place_of_reference(model: LoggedModel) -> str | None:
    """Return the path or URL of the checkpoint that a model refers to; None for a model that has its weights.

    Raises LookupError where the checkpoint was removed.
    """
    if model.model_type != TYPE:
        return None
    if REMOVED_TAG in model.tags:
        raise LookupError(f"its run has removed this checkpoint, of step {model.tags[STEP_TAG]}")
    return str(model.tags[PLACE_TAG])


def replace_reference(run: MlflowRun, step: int) -> None:
    """Remove the reference to a checkpoint whose model was logged with its weights."""
    for model in models_of(run.client, run.run_id):
        if model.model_type == TYPE and model.tags.get(STEP_TAG) == str(step):
            with suppress(MlflowException):  # It would be a second row of the same step, no more.
                run.client.delete_logged_model(model.model_id)


def _log(run: MlflowRun, location: str, one: KeptCheckpoint, model: LoggedModel | None) -> None:
    """Create the model of a checkpoint, or bring it up to date. It is READY when all of it is there."""
    place = f"{redact(location)}/{CHECKPOINTS_FOLDER}/{checkpoint_name(one.step)}"
    tags = _tags(one, place)
    if model is None:
        model = run.client.create_logged_model(
            run.experiment_id, checkpoint_name(one.step), run.run_id, tags, {"step": str(one.step)}, TYPE
        )
    elif model.model_type != TYPE:  # It has its weights, and stays as it is when the checkpoint is removed.
        tags = {}
    if any(model.tags.get(name) != text for name, text in tags.items()):
        run.client.set_logged_model_tags(model.model_id, tags)
    if REMOVED_TAG in model.tags and not one.removed and tags:  # A restart has written it again.
        run.client.delete_logged_model_tag(model.model_id, REMOVED_TAG)
    has = {metric.key for metric in model.metrics or []}
    points = [
        Metric(name, value, time_ms, one.step, model_id=model.model_id)
        for name, (value, time_ms) in one.metrics.items()
        if name not in has
    ]
    if points:
        # The store keeps a metric of the same time, step and value once, so the run's own points are not doubled.
        run.log_metrics(points)
    if model.status == LoggedModelStatus.PENDING and tags:
        _link(run, model, one.step)
        run.client.finalize_logged_model(model.model_id, "READY")


def _link(run: MlflowRun, model: LoggedModel, step: int) -> None:
    """Make a model an output of the run, unless a driver that died has done so."""
    outputs = run.client.get_run(run.run_id).outputs
    linked = [output.model_id for output in outputs.model_outputs] if outputs is not None else []
    if model.model_id not in linked:
        run.client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, step=step)])


def _tags(one: KeptCheckpoint, place: str) -> dict[str, str]:
    note = (
        f"The checkpoint of step {one.step} was at `{place}`. The run has removed it: it keeps the newest ones and the "
        "best (`train.keep_checkpoints`)."
        if one.removed
        else f"The checkpoint of step {one.step}. Its weights are not copied here; they are at `{place}`.\n\n"
        f"```sh\nresnet-dist predict {place} IMAGE…\n```\n\nSHA-256 of `model.safetensors`: `{one.sha256}`"
    )
    removed = {REMOVED_TAG: "true"} if one.removed else {}
    return {STEP_TAG: str(one.step), PLACE_TAG: place, CHECKSUM_TAG: one.sha256, NOTE_TAG: note, **removed}
