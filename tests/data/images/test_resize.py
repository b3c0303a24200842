"""The interpolation of crops: Pillow's own resizing of the same box, and draws that depend on the sample alone."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from resnet_dist.config import Data
from resnet_dist.data.images import view
from resnet_dist.data.images.crop import random_box, resize_mode, to_sizes
from resnet_dist.data.images.decode import open_image
from resnet_dist.data.images.draws import randomness

HEIGHT, WIDTH, SIZE = 90, 110, 61


def data(**changes: object) -> Data:
    fields: dict[str, object] = {"train": "", "eval": "", "image_size": SIZE, "global_batch_size": 8}
    return Data.model_validate(fields | {"crop": "random-resized-crop"} | changes)


def picture() -> Image.Image:
    """Return noise that bicubic's overshoot keeps inside of 0..255, as libraries cut it off between rows and columns."""
    return Image.fromarray(np.random.default_rng(0).integers(70, 186, (HEIGHT, WIDTH, 3), np.uint8))


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_crop_is_resized_as_pillow_does(mode: str) -> None:
    image, fields = picture(), data(resize=mode, eval_resize=mode, eval_crop=0.9)
    opened, resample = open_image(encoded(image), 3), Image.Resampling[mode.upper()]
    draws_NK = randomness(np.arange(20), fields, seed=0, epoch=0).crop_NK
    for draws in (*draws_NK, None):
        [found] = to_sizes(opened, fields, [draws], [False], SIZE)
        if draws is None:
            top, left, side = 4, 14, 81  # the middle 90 % of the short side
            box = (left, top, left + side, top + side)
        else:
            chosen = random_box(HEIGHT, WIDTH, SIZE, draws)
            box = (chosen.left, chosen.top, chosen.left + chosen.width, chosen.top + chosen.height)
        expected = np.asarray(image.crop(box).resize((SIZE, SIZE), resample))
        # Rows and columns are rounded one after the other.
        assert np.abs(found.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resizing_is_that_of_interpolate_with_and_without_its_operator(mode: str) -> None:
    image = torch.from_numpy(np.array(picture()).transpose(2, 0, 1)[None]).contiguous(
        memory_format=torch.channels_last
    )
    expected = F.interpolate(image, (SIZE, 40), mode=mode, antialias=True)
    for operators in (torch._C._nn, None):
        assert torch.equal(view._resizer(mode, operators)(image, [SIZE, 40], False, None), expected)


def test_a_random_interpolation_is_drawn_for_each_copy_of_each_sample() -> None:
    fields = data(resize="random")
    first, second = (
        randomness(np.arange(400), fields, seed=0, epoch=0, copies_N=np.full(400, copy)).crop_NK
        for copy in (0, 1)
    )
    modes = [[resize_mode(fields, draws) for draws in crops] for crops in (first, second)]
    assert {*modes[0]} == {"bilinear", "bicubic"}
    assert 0.4 < np.mean([mode == "bicubic" for mode in modes[0]]) < 0.6
    assert 0.4 < np.mean([a == b for a, b in zip(*modes, strict=True)]) < 0.6
    assert np.array_equal(first, randomness(np.arange(400), data(), seed=0, epoch=0).crop_NK)
    # Both halves have boxes of the same areas: the bit that chooses is not one that the area depends on.
    areas = {mode: first[np.array(modes[0]) == mode, 0].mean() for mode in ("bilinear", "bicubic")}
    assert abs(areas["bilinear"] - areas["bicubic"]) < 0.1


def test_the_middle_has_the_interpolation_of_evaluation() -> None:
    fields = data(resize="bicubic")
    assert resize_mode(fields, None) == "bilinear"
    assert resize_mode(data(eval_resize="bicubic"), None) == "bicubic"
    assert resize_mode(fields, np.zeros(40)) == "bicubic"
