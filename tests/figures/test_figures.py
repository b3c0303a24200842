"""The numbers of the figures are right, and every figure can be drawn, of whatever a run has."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_dist.figures.calibration import calibration
from resnet_dist.figures.classes import class_rows
from resnet_dist.figures.confusions import MAX_ROWS, confused_pairs, confusion_counts, groups_of
from resnet_dist.figures.curves import MAX_POINTS
from resnet_dist.figures.files import evaluation_files, training_files
from resnet_dist.train.predictions import Predictions


def predictions(num_classes: int, samples: int, *, wrong: float, size: int = 8) -> Predictions:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, samples).astype(np.int32)
    is_wrong = rng.random(samples) < wrong
    predicted = np.where(is_wrong, (labels + 1) % num_classes, labels).astype(np.int32)
    sure = rng.random(samples).astype(np.float32)
    worst = np.flatnonzero(labels != predicted)[:36]
    images = rng.integers(0, 255, (len(worst), size, size, 3)).astype(np.uint8)
    return Predictions(np.arange(samples), labels, predicted, sure, sure / 2, worst, images)


def shapes(files: dict[str, bytes]) -> dict[str, tuple[int, int]]:
    return {
        name: Image.open(io.BytesIO(content)).size for name, content in files.items() if name.endswith(".png")
    }


def test_confusions_and_classes_are_counted() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 2], np.int32), np.array([0, 1, 1, 1, 0, 2], np.int32)
    counts = confusion_counts(labels, predicted, 4)
    assert counts.tolist() == [[1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    a, b = confused_pairs(counts, "abcd")
    assert a == {"class": "a", "predicted": "b", "samples": 2, "share": 2 / 3}
    assert (b["class"], b["predicted"], b["share"]) == ("b", "a", 0.5)
    rows = class_rows(counts, "abcd")
    assert rows[0] == {"class": "a", "samples": 3, "top1": 1 / 3, "precision": 0.5}
    assert rows[3] == {"class": "d", "samples": 0, "top1": None, "precision": None}


@pytest.mark.parametrize("count", [1, 39, 40, 41, 1000, 21843])
def test_groups_are_neighbours_and_leave_no_class_out(count: int) -> None:
    groups = groups_of(count)
    assert len(groups) <= MAX_ROWS
    assert [label for group in groups for label in group] == list(range(count))
    sizes = {len(group) for group in groups}
    assert max(sizes) - min(sizes) <= 1


def test_the_calibration_error_of_an_example_by_hand() -> None:
    # Two of three are right at 0.8, which is the upper edge of a bin; one of one at 0.4; zero and one have bins too.
    probabilities = np.array([0.8, 0.8, 0.8, 0.4, 0.0, 1.0])
    is_right = np.array([True, True, False, True, False, True])
    found = calibration(probabilities, is_right)
    assert found["ece"] == pytest.approx((abs(2 - 2.4) + 0.6 + 0 + 0) / 6)
    assert sum(found["samples"]) == 6
    assert found["samples"][11] == 3
    assert found["accuracy"][11] == pytest.approx(2 / 3)
    assert found["accuracy"][1] is None


@pytest.mark.parametrize(
    ("num_classes", "samples", "wrong"),
    [(1000, 5000, 0.3), (2, 3, 1.0), (1, 2, 0.0)],
)
def test_every_evaluation_can_be_drawn(num_classes: int, samples: int, wrong: float) -> None:
    names = [
        f"class_{number} of $ a <long> näme \N{LATIN SMALL LETTER SHARP S}" for number in range(num_classes)
    ]
    found = predictions(num_classes, samples, wrong=wrong)
    files = evaluation_files(Predictions.from_bytes(found.to_bytes()), names, 12)
    drawn = shapes(files)
    assert set(drawn) == {"confusions.png", "classes.png", "calibration.png"} | (
        {"worst_images.png"} if len(found.worst_K) else set()
    )
    assert all(width >= 400 and height >= 200 for width, height in drawn.values())
    numbers = json.loads(files["confusions.json"])
    cells = numbers.get("cells") or [
        [r, c, n] for r, row in enumerate(numbers["counts"]) for c, n in enumerate(row)
    ]
    assert sum(cell[2] for cell in cells) == samples


def test_an_evaluation_without_samples_has_no_figures() -> None:
    nothing = predictions(3, 0, wrong=0.0)
    assert evaluation_files(nothing, "abc", 1) == {}


def test_curves_keep_their_last_point_and_few_others(tmp_path: Path) -> None:
    assert training_files({"system/cpu_percent": {1: 2.0}}, {}) == {}
    loss = {step: 1 / step for step in range(1, 3 * MAX_POINTS)}
    norms = {1: {"conv1": 0.5, "layer1.0": 0.0}, 2: {"conv1": 0.25, "layer1.0": 0.0}}
    files = training_files({"train/loss": loss, "eval/top1": {7: 0.5}}, norms)
    assert set(files) == {"curves.png", "curves.json", "gradient_norms.png"}
    data = json.loads(files["curves.json"])
    assert data["eval/top1"] == {"step": [7.0], "value": [0.5]}
    assert len(data["train/loss"]["step"]) <= MAX_POINTS + 1
    assert data["train/loss"]["step"][-1] == 3 * MAX_POINTS - 1
