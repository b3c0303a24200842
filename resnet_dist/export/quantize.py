"""Write an ONNX file of 8-bit integers, with its accuracy on labelled images before and after; refuse a large drop.

ONNX Runtime quantizes statically: the ranges of activations are those of some training images, and weights have a
scale for each channel. Normalization and pooling stay in float32.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnet_dist.data.findings import BAD_IMAGE, Findings
from resnet_dist.data.shards.index import Index, check_shards, read_index
from resnet_dist.data.shards.labels import class_difference
from resnet_dist.data.storage.urls import is_local, local_path, shown
from resnet_dist.errors import UserError
from resnet_dist.export.formats import (
    FORMATS,
    Format,
    check_onnx,
    describe,
    describe_onnx,
    input_of,
    source_of,
)
from resnet_dist.export.run import ExportDiffers, explained
from resnet_dist.train.checkpoint.load import TrainedModel
from resnet_dist.train.evaluate import evaluation_loader
from resnet_dist.world import World

MAX_CALIBRATION = 512  # images from which the ranges of activations are taken
QUANTIZED = ("Conv", "Gemm", "MatMul", "Add", "MaxPool")  # the others have no use of it, or lose by it


@dataclass(frozen=True)
class Drop:
    """The accuracy of a model, and that of its integers."""

    num_images: int
    before: float  # top-1, a share
    after: float
    num_changed: int  # images whose first class differs
    num_bytes: tuple[int, int]  # of the float32 file, and of the integers
    place: str  # of the images
    calibration: str

    def __str__(self) -> str:
        before, after = (f"{count / 2**20:.1f}" for count in self.num_bytes)
        return (
            f"top-1 {self.before:.2%} before, {self.after:.2%} as int8, over {self.num_images:,} images of {self.place}; the "
            f"first class differs for {self.num_changed:,}; {before} → {after} MB; ranges from {self.calibration}"
        )


def check_quantize(form: Format) -> None:
    """Raise UserError where the format has no integers, or what makes them is not installed."""
    if form is not FORMATS["onnx"]:
        raise UserError("--quantize int8 writes an ONNX file; give OUT the end .onnx")
    check_onnx("--quantize int8")


def labelled_sets(trained: TrainedModel, samples: Sequence[str] | None) -> tuple[Index, Index, str]:
    """Return the images to measure on, those to take ranges from, and words for the latter.

    samples: one set of shards with an index, in place of the held-out set. Raises UserError where there is none here.
    """
    data = trained.recipe.data
    if samples and len(samples) > 1:
        raise UserError("--quantize int8 measures accuracy on one set: give --samples once, a set of shards")
    place = samples[0] if samples else data.eval
    if not samples and is_local(place) and not local_path(place).exists():
        raise UserError(
            f"--quantize int8 measures accuracy on labelled images, and {shown(place)} is not on this machine; name shards "
            "with an index by --samples"
        )
    measured = _index(place, trained)
    if is_local(data.train) and local_path(data.train).exists():
        return measured, _index(data.train, trained), shown(data.train)
    return (
        measured,
        measured,
        f"the measured images themselves, because {shown(data.train)} is not on this machine",
    )


def export_int8(
    trained: TrainedModel,
    out: Path,
    sets: tuple[Index, Index, str],
    findings: Findings,
    max_drop: float,
    *,
    pixels: bool,
) -> Drop:
    """Write `out` as integers; return the accuracy before and after. findings: gets images that cannot be decoded.

    Raises ExportDiffers where top-1 falls by more than `max_drop`, StorageError where it cannot be written; neither
    leaves a file.
    """
    measured, calibration, words = sets
    with (
        explained(out),
        tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as folder,
    ):
        plain, partial = Path(folder) / "plain.onnx", Path(folder) / out.name
        FORMATS["onnx"].write(trained, plain, pixels)
        _quantize(trained, plain, partial, calibration, pixels)
        before, after, changed, count = _accuracies(trained, partial, measured, findings, pixels)
        sizes = plain.stat().st_size, partial.stat().st_size
        found = Drop(count, before, after, changed, sizes, shown(measured.location), words)
        if not before - after <= max_drop:
            raise ExportDiffers(f"{out}: {found}; --max-drop allows {max_drop:g}; the file was not kept")
        os.replace(partial, out)
    return found


def _index(place: str, trained: TrainedModel) -> Index:
    index = read_index(place)
    check_shards(index)
    if difference := class_difference(index.classes, trained.classes):
        raise UserError(f"{index.location} has other classes than the model was trained on: {difference}")
    return index


def _quantize(trained: TrainedModel, plain: Path, out: Path, calibration: Index, pixels: bool) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._images = _calibration_images(trained, calibration)

        def get_next(self) -> dict[str, Any] | None:
            images = next(self._images, None)
            return None if images is None else {"images": input_of(trained, images, pixels).numpy()}

    prepared = plain.with_name("prepared.onnx")
    quant_pre_process(str(plain), str(prepared))
    quantize_static(
        str(prepared),
        str(out),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(QUANTIZED),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    model = onnx.load(out)
    about = {**describe(trained, pixels=pixels), "quantized": "int8"}
    describe_onnx(model, about)
    onnx.save(model, out)


def _calibration_images(trained: TrainedModel, index: Index) -> Iterator[Tensor]:
    """Yield images from all parts of a set, since sets are often in the order of their classes."""
    with evaluation_loader(index, trained.recipe.data, World.single()) as loader:
        size = min(loader.order.global_batch_size, MAX_CALIBRATION)
        count = min(loader.order.steps_per_epoch, max(1, MAX_CALIBRATION // size))
        for step in np.linspace(0, loader.order.steps_per_epoch - 1, count).astype(int).tolist():
            batch = loader.batch_at(step)
            good = batch.images_BSSC[batch.weights_B > 0]
            # From all lanes: a batch has the samples of one after the other.
            if len(good):
                yield good[:: max(1, len(good) // size)][:size]


def _accuracies(
    trained: TrainedModel, path: Path, index: Index, findings: Findings, pixels: bool
) -> tuple[float, float, int, int]:
    """Return top-1 of the source and of the file, the number of images that change their class, and of all images."""
    source, run = source_of(trained), FORMATS["onnx"].open(trained, path, pixels)
    hits, changed, count = [0, 0], 0, 0
    with evaluation_loader(index, trained.recipe.data, World.single()) as loader:
        for step in range(loader.order.steps_per_epoch):
            batch = loader.batch_at(step)
            for text in batch.bad:
                name, _, reason = text.partition(": ")
                findings.leave_out(name, BAD_IMAGE, reason)
            is_good = batch.weights_B > 0
            images, labels = batch.images_BSSC[is_good], batch.labels_B[is_good]
            if not len(images):
                continue
            with torch.inference_mode():
                classes = [source(images).argmax(1), run(images).argmax(1)]
            hits = [hit + int((found == labels).sum()) for hit, found in zip(hits, classes, strict=True)]
            changed, count = changed + int((classes[0] != classes[1]).sum()), count + len(images)
    if not count:
        raise UserError(f"none of the {index.num_samples} samples of {index.location} can be evaluated")
    return hits[0] / count, hits[1] / count, changed, count
