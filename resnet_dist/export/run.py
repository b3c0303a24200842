"""Write one file, compare it with its source on real images, and let it appear only if they agree."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resnet_dist.data.findings import BAD_IMAGE, Findings
from resnet_dist.errors import ExplainedError, StorageError, UserError
from resnet_dist.export.formats import FORMATS, Format, Run, plain_source_of, source_of
from resnet_dist.predict.classify import decoded_batches
from resnet_dist.predict.unread import Input
from resnet_dist.train.checkpoint.load import TrainedModel


class ExportDiffers(ExplainedError, RuntimeError):
    """An exported file that does not give what its source gives; it was not kept."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of an exported file with its source."""

    num_images: int
    largest: float  # difference of two logits
    num_changed: int  # images whose first class differs
    num_bad: int = 0  # images that could not be decoded, and were not compared
    remark: str = ""  # on what was compared

    def __str__(self) -> str:
        bad = f"; {self.num_bad:,} more could not be decoded" if self.num_bad else ""
        return (
            f"largest difference of a logit {self.largest:.2g} over {self.num_images:,} images; the first class differs "
            f"for {self.num_changed:,}{bad}{self.remark}"
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
    trained: TrainedModel,
    out: Path,
    form: Format,
    images: Iterable[Input],
    findings: Findings,
    tolerance: float,
    *,
    pixels: bool,
) -> Comparison:
    """Write `out` and return its comparison with the source over `images`.

    findings: gets the images that cannot be decoded. Raises ExportDiffers where a logit differs by more than
    `tolerance`, UserError where no image can be decoded, StorageError where it cannot be written; none leaves a file.
    """
    # In a folder beside the file, so that the last step is a rename: some formats write several files on their way.
    with (
        explained(out),
        tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as folder,
    ):
        partial = Path(folder) / out.name
        form.write(trained, partial, pixels)
        found = compare(trained, form, form.open(trained, partial, pixels), images, findings)
        if not found.largest <= tolerance:  # A NaN is refused too.
            raise ExportDiffers(
                f"{out}: {found}, and --tolerance allows {tolerance:g}; the file was not kept"
            )
        os.replace(partial, out)
    return found


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """Raise StorageError, in one sentence, where a file cannot be written in the block."""
    try:
        yield
    except ExplainedError:
        raise
    except OSError as error:
        raise StorageError(f"OUT {out}: cannot be written: {error.strerror or error}") from None


def compare(
    trained: TrainedModel, form: Format, run: Run, images: Iterable[Input], findings: Findings
) -> Comparison:
    """Compare a file with what its format writes of the model. findings: gets the images that cannot be decoded."""
    source, remark = source_of(trained), ""
    left_out = [name for name in ("eval_flip", "eval_shift") if getattr(trained.recipe.data, name)]
    if left_out and not form.averages:
        source = plain_source_of(trained)
        fields = " and ".join(f"data.{name}" for name in left_out)
        remark = f"; the file has the net alone, without {fields}, the mean over an image and its variants"
    largest, changed, count, num_bad = 0.0, 0, 0, 0
    for batch in decoded_batches(images, trained.recipe.data):
        for given, problem in zip(batch.inputs, batch.problems, strict=True):
            if problem is not None:
                findings.leave_out(given.name, BAD_IMAGE, problem)
                num_bad += 1
        good = batch.images_NSSC[[problem is None for problem in batch.problems]]
        # In two parts of different sizes: the number of images in a batch is free.
        for part in (good[:1], good[1:]):
            if len(part):
                difference, num_changed = _difference(source, run, part)
                largest = max(largest, difference) if difference == difference else difference
                changed, count = changed + num_changed, count + len(part)
    if not count:
        raise UserError("no image to compare the export with could be decoded; name some with --samples")
    return Comparison(count, largest, changed, num_bad, remark)


def _difference(source: Run, run: Run, images_NSSC: Tensor) -> tuple[float, int]:
    with torch.inference_mode():
        expected = source(images_NSSC).float()
    with torch.no_grad():
        found = run(images_NSSC).float()
    if found.shape != expected.shape:
        return float("nan"), len(expected)
    changed = int((found.argmax(1) != expected.argmax(1)).sum())
    return float((found - expected).abs().max()), changed
