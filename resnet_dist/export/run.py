"""Write one file, compare it with its source on real images, and let it appear only if they agree."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resnet_dist.errors import ExplainedError, UserError
from resnet_dist.export.formats import FORMATS, Format, Run, source_of
from resnet_dist.predict.classify import decoded_batches
from resnet_dist.predict.inputs import Input
from resnet_dist.train.checkpoint.load import TrainedModel


class ExportDiffers(ExplainedError, RuntimeError):
    """An exported file that does not give what its source gives; it was not kept."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of an exported file with its source."""

    num_images: int
    largest: float  # difference of two logits
    num_changed: int  # images whose first class differs

    def __str__(self) -> str:
        return (
            f"largest difference of a logit {self.largest:.2g} over {self.num_images:,} images; the first class differs "
            f"for {self.num_changed:,}"
        )


def format_of_file(out: Path, name: str | None, *, pixels: bool) -> Format:
    """Return the format for a file. Raises UserError where its name, the format and the options do not fit."""
    if name is None:
        name = next((known for known, form in FORMATS.items() if out.suffix in form.suffixes[:1]), None)
        if name is None:
            raise UserError(
                f"OUT {out}: its end names no format; use {', '.join(f.suffixes[0] for f in FORMATS.values())}, or --format"
            )
    form = FORMATS[name]
    if out.suffix not in form.suffixes:
        raise UserError(f"OUT {out}: a file of --format {name} ends with {' or '.join(form.suffixes)}")
    if pixels and not form.takes_pixels:
        raise UserError(f"--pixels changes a graph, and --format {name} has none; use onnx or pt2")
    if out.exists():
        raise UserError(f"OUT {out}: exists already; give another name, or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"OUT {out}: no such folder {out.absolute().parent}")
    return form


def export(
    trained: TrainedModel, out: Path, form: Format, images: Iterable[Input], tolerance: float, *, pixels: bool
) -> Comparison:
    """Write `out` and return its comparison with the source over `images`.

    Raises ExportDiffers where a logit differs by more than `tolerance`, UserError where no image can be decoded; neither
    leaves a file.
    """
    # In a folder beside the file, so that the last step is a rename: some formats write several files on their way.
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as folder:
        partial = Path(folder) / out.name
        form.write(trained, partial, pixels)
        found = compare(trained, form.open(trained, partial, pixels), images)
        if not found.largest <= tolerance:  # A NaN is refused too.
            raise ExportDiffers(
                f"{out}: {found}, and --tolerance allows {tolerance:g}; the file was not kept"
            )
        os.replace(partial, out)
    return found


def compare(trained: TrainedModel, run: Run, images: Iterable[Input]) -> Comparison:
    source, largest, changed, count = source_of(trained), 0.0, 0, 0
    for batch in decoded_batches(images, trained.recipe.data):
        good = batch.images_NSSC[[problem is None for problem in batch.problems]]
        # In two parts of different sizes: the number of images in a batch is free.
        for part in (good[:1], good[1:]):
            if len(part):
                difference, num_changed = _difference(source, run, part)
                largest = max(largest, difference) if difference == difference else difference
                changed, count = changed + num_changed, count + len(part)
    if not count:
        raise UserError("no image to compare the export with could be decoded; name some with --samples")
    return Comparison(count, largest, changed)


def _difference(source: Run, run: Run, images_NSSC: Tensor) -> tuple[float, int]:
    with torch.inference_mode():
        expected = source(images_NSSC).float()
    with torch.no_grad():
        found = run(images_NSSC).float()
    if found.shape != expected.shape:
        return float("nan"), len(expected)
    changed = int((found.argmax(1) != expected.argmax(1)).sum())
    return float((found - expected).abs().max()), changed
