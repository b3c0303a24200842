"""All figures of a run, by the names of their files: NAME.png for the eye, NAME.json with the numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from resnet_dist.figures.calibration import draw_calibration
from resnet_dist.figures.classes import draw_classes
from resnet_dist.figures.confusions import confusion_counts, draw_confusions
from resnet_dist.figures.curves import Series, draw_curves
from resnet_dist.figures.drawing import Drawn
from resnet_dist.figures.layers import draw_layers
from resnet_dist.figures.worst import draw_worst
from resnet_dist.train.predictions import Predictions

WORST = "worst_images"


def training_files(
    metrics: Mapping[str, Series], norms: Mapping[int, Mapping[str, float]]
) -> dict[str, bytes]:
    """Return the files of the curves, and of the gradients of the layers where these were recorded."""
    return _files({"curves": draw_curves(metrics), "gradient_norms": draw_layers(norms)})


def evaluation_files(found: Predictions, classes: Sequence[str], step: int) -> dict[str, bytes]:
    """Return the files of the figures of an evaluation; without samples there are none."""
    if not len(found.ids_N):
        return {}
    counts = confusion_counts(found.labels_N, found.predictions_N, len(classes))
    is_right = found.labels_N == found.predictions_N
    drawn = {
        "confusions": draw_confusions(counts, classes),
        "classes": draw_classes(counts, classes),
        "calibration": draw_calibration(found.probabilities_N, is_right),
        WORST: draw_worst(found, classes, step),
    }
    return _files(drawn)


def _files(drawn: Mapping[str, Drawn | None]) -> dict[str, bytes]:
    files = {}
    for name, one in drawn.items():
        if one is None:
            continue
        files[f"{name}.png"] = one.png
        if one.data:
            files[f"{name}.json"] = json.dumps(one.data, ensure_ascii=False).encode(errors="backslashreplace")
    return files
