"""The images on which an export is compared with its source: real ones, where there are some."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, islice

import numpy as np

from resnet_dist.data.findings import Findings
from resnet_dist.data.storage.urls import is_local, local_path, shown
from resnet_dist.predict.inputs import inputs_of
from resnet_dist.predict.unread import Input
from resnet_dist.train.checkpoint.load import TrainedModel

MAX_HELD_OUT = 1024  # images of the held-out set; those of --samples are all used
NUM_GENERATED = 64


def samples_of(
    trained: TrainedModel, paths: Sequence[str] | None, findings: Findings
) -> tuple[Iterable[Input], str]:
    """Return the images, and what they are, for a message.

    paths: None takes the held-out set of the recipe if it lies on this machine, else generated images. Raises UserError
    where a path does not exist. findings: gets what the paths hold beside images.
    """
    data = trained.recipe.data
    if paths:
        named = inputs_of(paths, data, findings)
        # Find the first one now: a mistake in a path is to be found before the export.
        return chain(list(islice(named, 1)), named), "of --samples"
    if is_local(data.eval) and local_path(data.eval).exists():
        held_out = inputs_of([data.eval], data, findings)
        return islice(held_out, MAX_HELD_OUT), f"of {data.eval}"
    missing = f"generated, because {shown(data.eval)} is not on this machine; --samples names real ones"
    return [
        Input(f"generated {number}", partial(_generated, number)) for number in range(NUM_GENERATED)
    ], missing


def _generated(number: int) -> bytes:
    """Return a picture of random blocks, whose colors differ as those of a photograph do."""
    from PIL import Image

    blocks = np.random.default_rng(number).integers(0, 256, (7, 7, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((256, 256), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()
