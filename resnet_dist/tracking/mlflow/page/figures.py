"""Make the figures of a run that has ended from what its storage keeps, and log them."""

from __future__ import annotations

import io
import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import PurePosixPath

from PIL import Image

from resnet_dist.figures.files import WORST, evaluation_files, training_files
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.page import EVALUATIONS_FOLDER, index_file, predictions_file, step_of_predictions
from resnet_dist.tracking.logged_run import FIGURES_TAG, IMAGES, steps_of
from resnet_dist.tracking.mlflow.run import MlflowRun
from resnet_dist.tracking.spool import Entry, Follower
from resnet_dist.train.predictions import Predictions
from resnet_dist.train.step.gradient_norms import GRADIENT_NORMS

FOLDER = "figures"  # of the artifacts of a run
MAX_CLASSES = 5_000  # Their matrix takes 200 MB, a few times over.
MAX_EVALUATIONS = 20  # drawn after a run: each may take seconds


def log_figures(run: MlflowRun, folder: RunFolder, report: Callable[[str], None]) -> None:
    """Log the curves, and the figures of the evaluations whose predictions were kept and that have none yet.

    At most MAX_EVALUATIONS are drawn, the newest; the rest is reported. Raises what the store and the storage raise.
    """
    entries = Follower(folder.spool).read()
    files = training_files(_series(entries), _norms(entries))
    run.log_files({f"{FOLDER}/{name}": content for name, content in files.items()})
    classes, steps = _classes(folder), evaluations_of(folder)
    done = _steps_done(run)
    left = [step for step in steps[-MAX_EVALUATIONS:] if step not in done]
    if classes is None or not left:
        return
    if len(classes) > MAX_CLASSES:
        report(f"no figures of {len(classes):,} classes: at most {MAX_CLASSES:,} can be drawn")
        return
    if len(steps) > MAX_EVALUATIONS:
        report(
            f"figures of the newest {MAX_EVALUATIONS} of {len(steps)} evaluations; the predictions of all are in "
            f"{folder.location}/{EVALUATIONS_FOLDER}"
        )
    for step in left:
        files = _evaluation_files(folder, step, classes)
        # The last evaluation is the one to look at first.
        place = FOLDER if step == steps[-1] else f"{FOLDER}/step-{step:08d}"
        run.log_files({f"{place}/{name}": content for name, content in files.items()})
        if (image := files.get(f"{WORST}.png")) is not None:
            run.client.log_image(run.run_id, Image.open(io.BytesIO(image)), key=IMAGES, step=step)
        done = [*done, step]
        run.set_tags({FIGURES_TAG: " ".join(map(str, done))})


def evaluations_of(folder: RunFolder) -> list[int]:
    """Return the steps of the evaluations whose predictions were kept."""
    names = [PurePosixPath(found.name).name for found in folder.storage.objects(EVALUATIONS_FOLDER)]
    return sorted(step_of_predictions(name) for name in names if name.startswith("step-"))


def _evaluation_files(folder: RunFolder, step: int, classes: list[str]) -> dict[str, bytes]:
    content = folder.storage.at(EVALUATIONS_FOLDER).read(predictions_file(step))
    return {} if content is None else evaluation_files(Predictions.from_bytes(content), classes, step)


def _classes(folder: RunFolder) -> list[str] | None:
    """Return the names of the classes; None for a run of an earlier version, which has not kept them."""
    text = folder.page.read(index_file("eval"))
    return None if text is None else json.loads(text)["classes"]


def _steps_done(run: MlflowRun) -> list[int]:
    return steps_of(run.client.get_run(run.run_id).data.tags.get(FIGURES_TAG, ""))


def _series(entries: list[Entry]) -> dict[str, dict[int, float]]:
    """Return the finite values of each metric by step; of a step that a restart repeated, the last ones."""
    series: dict[str, dict[int, float]] = defaultdict(dict)
    for entry in entries:
        for name, value in entry.metrics.items():
            if entry.step is not None and math.isfinite(value):
                series[name][entry.step] = value
    return series


def _norms(entries: list[Entry]) -> dict[int, dict[str, float]]:
    return {
        entry.step: entry.layers[GRADIENT_NORMS]
        for entry in entries
        if entry.step is not None and GRADIENT_NORMS in entry.layers
    }
